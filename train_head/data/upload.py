"""Batches on their way to the device: on CUDA the next one is copied, on a stream of its own, while a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

Copy = Callable[[Tensor], Tensor]
"""Brings a tensor to the computing device; there it may still be on its way."""
T = TypeVar("T")
Place = Callable[[T, Copy], T]
"""A clip with all of its tensors copied."""


def place_batches(batches: Iterator[list[T]], place: Place[T], device: torch.device) -> Iterator[list[T]]:
    """Yield the batches on the device.

    On CUDA a batch is sent off just before the one ahead of it is handed out, and handed out once it has arrived: so
    to wait for a copy is to wait for data. The memory that it came from is let go by then, and not before.
    """
    if device.type != "cuda":
        yield from map(lambda clips: [place(clip, _as_it_is) for clip in clips], batches)  # noqa: C417  # keeps no clip
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    uploads = map(lambda clips: _Upload(clips, place, stream), batches)  # noqa: C417
    coming = next(uploads, None)
    while coming is not None:
        arrived = [coming.wait()]  # in a list, so that nothing here holds a batch that is trained on
        coming = next(uploads, None)
        yield arrived.pop()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Upload(Generic[T]):
    """A batch that is being copied."""

    def __init__(self, clips: list[T], place: Place[T], stream: torch.cuda.Stream) -> None:
        compute = torch.cuda.current_stream(stream.device)

        def copy(tensor: Tensor) -> Tensor:
            copied = tensor.to(stream.device, non_blocking=True)
            copied.record_stream(compute)  # which reads it: its memory is not used again before that is done
            return copied

        self._sent = clips
        with torch.cuda.stream(stream):
            self._placed = [place(clip, copy) for clip in clips]
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[T]:
        """The batch, once it is there."""
        self._arrived.synchronize()
        self._sent = []
        return self._placed
