"""Reading frames of an array: the fast reader where it knows the layout, else zarr-python; or from memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import fill_value, read_metadata
from cache.storage.shards import ShardedFrames, checked_output, corrupt_frame


class FrameArray(Protocol):
    """An array (T, ...) stored frame by frame."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, ...)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""
        ...

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The frames (len(frames), ...) in the order asked for, repetitions allowed, into `out` if given.

        `out` must be C-contiguous, of this dtype and shape. Raises CorruptData where a frame is missing or
        damaged, and IndexError for frames outside [0, T).
        """
        ...


def open_frames(folder: Path) -> FrameArray:
    """Open the Zarr array in `folder`. Raises CorruptData where it has no readable metadata."""
    try:
        metadata = json.loads(read_metadata(folder).decode())
        return ShardedFrames.recognise(folder, metadata) or ZarrFrames.of(folder, metadata)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(f"unreadable array metadata: {error!r}", where=folder) from error


@dataclass(frozen=True, kw_only=True)
class ZarrFrames:
    """Any other Zarr array (other codecs, chunks or shards), through zarr-python and therefore slowly."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, folder: Path, metadata: dict[str, Any]) -> ZarrFrames:
        """The array in `folder`; it is opened anew by every read, so that it may travel between processes."""
        shape = tuple(metadata["shape"])
        if any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"impossible shape {shape}")
        return cls(folder=folder, shape=shape, dtype=np.dtype(metadata["data_type"]))

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See FrameArray. One basic-indexing read a frame: fancy indexing of shards is far slower still."""
        out = checked_output(self.shape, self.dtype, frames, out)
        try:
            array = zarr.open_array(str(self.folder), mode="r")
            if min(array.shards or array.chunks) < 1:
                raise ValueError("chunks of nothing")
        except Exception as error:  # damaged metadata can fail anywhere in their reader
            raise CorruptData(f"unreadable array metadata: {error!r}", where=self.folder) from error
        fill = fill_value(self.dtype)
        for position, frame in enumerate(frames):
            for file in self._files(array, frame):
                if not file.exists():
                    raise corrupt_frame("shard cannot be opened: no such file", file, self.folder, frame)
            try:
                out[position] = array[frame]
            except (ValueError, TypeError, RuntimeError, OSError, LookupError) as error:
                raise corrupt_frame(f"unreadable: {error}", self.folder, self.folder, frame) from error
            missing = np.isnan(out[position]) if fill != fill else out[position] == fill
            if missing.all():
                raise corrupt_frame("frame was never written", self.folder, self.folder, frame)
        return out

    def _files(self, array: zarr.Array[Any], frame: int) -> Iterator[Path]:
        """The files that hold a frame: zarr-python itself reads fill values where one is missing."""
        outer = array.shards or array.chunks
        grid = [range(-(-size // step)) for size, step in zip(self.shape[1:], outer[1:], strict=True)]
        for rest in product(*grid):
            yield self.folder / array.metadata.encode_chunk_key((frame // outer[0], *rest))


class HeldFrames:
    """An array that is read whole at first use and stays in memory, in each process for itself."""

    def __init__(self, stored: FrameArray) -> None:
        self._stored = stored
        self._values: NDArray[Any] | None = None
        self.shape, self.dtype = stored.shape, stored.dtype

    def __getstate__(self) -> dict[str, Any]:
        """Without the frames, so that an object sent to another process is small."""
        return {**self.__dict__, "_values": None}

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See FrameArray."""
        out = checked_output(self.shape, self.dtype, frames, out)
        if self._values is None:
            self._values = self._stored.read(range(self.shape[0]))
        # The frames were checked above; any other mode would copy through a buffer.
        return np.take(self._values, np.asarray(frames, np.intp), axis=0, out=out, mode="clip")
