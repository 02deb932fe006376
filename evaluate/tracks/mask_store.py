"""Run lengths of a video's tracks, packed: a few bytes a mask instead of objects, beyond 16 MB in a temporary file.

Ten tracks of 100,000 frames are a million masks, which as Python objects would take 200 MB.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from typing import overload

from cache.labels.masks import Rle

_HELD_BYTES = 16 * 2**20


class MaskStore:
    """Masks (height, width) of N tracks, written frame by frame. The file ends with the last track that needs it."""

    def __init__(self, num_tracks: int, hw: tuple[int, int]) -> None:
        self.num_tracks, self.hw = num_tracks, hw
        self._file = tempfile.SpooledTemporaryFile(max_size=_HELD_BYTES)  # noqa: SIM115  # lives as long as its readers
        self._starts, self._lengths = array("q"), array("I")
        self._end = 0
        self.num_frames = 0

    def add_frames(self, count: int) -> None:
        """Append frames without masks."""
        self.num_frames += count
        self._starts.extend([0] * (count * self.num_tracks))
        self._lengths.extend([0] * (count * self.num_tracks))

    def put(self, frame: int, track: int, counts: str) -> None:
        """Give a frame of a track its mask, once, in COCO's compressed form."""
        index, text = frame * self.num_tracks + track, counts.encode("ascii")
        self._file.seek(self._end)
        self._file.write(text)
        self._starts[index], self._lengths[index] = self._end, len(text)
        self._end += len(text)

    def get(self, frame: int, track: int) -> Rle | None:
        """The mask of a frame, None where it has none."""
        index = frame * self.num_tracks + track
        if not self._lengths[index]:
            return None
        self._file.seek(self._starts[index])
        counts = self._file.read(self._lengths[index]).decode("ascii")
        return Rle(height=self.hw[0], width=self.hw[1], counts=counts)


class StoredMasks(Sequence[Rle | None]):
    """The masks of one track, one per frame; unpacked when they are asked for."""

    def __init__(self, store: MaskStore, track: int) -> None:
        self._store, self._track = store, track

    def __len__(self) -> int:
        return self._store.num_frames

    @overload
    def __getitem__(self, frame: int) -> Rle | None: ...
    @overload
    def __getitem__(self, frame: slice) -> tuple[Rle | None, ...]: ...

    def __getitem__(self, frame: int | slice) -> Rle | tuple[Rle | None, ...] | None:
        if isinstance(frame, slice):
            return tuple(self[index] for index in range(*frame.indices(len(self))))
        return self._store.get(range(len(self))[frame], self._track)
