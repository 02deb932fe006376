"""Tokens of a long video, kept for repeated reading: the first ones in memory, the others in a temporary file.

The decoder reads all encoded frames once per layer. Encoding anew for every layer would cost some 40 times as much
arithmetic as a decoder layer itself, so they are kept; a file, because memory shall not grow with the video.

Shapes: t frames of a block, q tokens of a frame, C channels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from cache.errors import CacheError

HELD_BYTES = 16 * 2**20  # 160 frames of the published size: YouTube-VIS never touches the disk


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Consecutive frames: their tokens, and which of the detector's query slots each one is."""

    tokens_tqC: Tensor
    slots_tq: Tensor  # int64

    @classmethod
    def whole_frames(cls, tokens_tqC: Tensor) -> TokenBlock:
        """All slots of every frame, in order."""
        slots = torch.arange(tokens_tqC.shape[1], device=tokens_tqC.device)
        return cls(tokens_tqC=tokens_tqC, slots_tq=slots.expand(len(tokens_tqC), -1))


class FrameSpill:
    """Blocks of frames in order; iterate as often as needed. A context manager: the file ends with it."""

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._room = held_bytes
        self._held: list[TokenBlock] = []
        self._stored: list[tuple[torch.Size, torch.device]] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> FrameSpill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, block: TokenBlock) -> None:
        """Append a block of float32 tokens."""
        self._room -= block.tokens_tqC.nbytes
        if self._room >= 0:
            self._held.append(block)
            return
        self._stored.append((block.tokens_tqC.shape, block.tokens_tqC.device))
        self._file.write(block.tokens_tqC.contiguous().cpu().numpy().data)
        self._file.write(block.slots_tq.to(torch.int16).contiguous().cpu().numpy().data)

    def __iter__(self) -> Iterator[TokenBlock]:
        yield from self._held
        position = 0
        for shape, device in self._stored:
            tokens, slots = torch.empty(shape), torch.empty(shape[:2], dtype=torch.int16)
            self._file.seek(position)  # every time: another loop may be reading too
            position += tokens.nbytes + slots.nbytes
            for tensor in (tokens, slots):
                if self._file.readinto(tensor.numpy().data) != tensor.nbytes:
                    raise CacheError("the temporary file of encoded frames ends early", where=tempfile.gettempdir())
            yield TokenBlock(tokens_tqC=tokens.to(device), slots_tq=slots.to(device).long())


def require_space(num_bytes: int, held_bytes: int = HELD_BYTES) -> None:
    """Raise CacheError where the folder for temporary files lacks room for that many bytes of tokens."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if num_bytes > held_bytes and num_bytes > free:
        raise CacheError(
            "too little room for the encoded frames of this video",
            where=folder,
            expected=f"{num_bytes / 1e9:.1f} GB",
            got=f"{free / 1e9:.1f} GB",
            hint="set TMPDIR to a folder on a larger disk",
        )
