"""What `python -m cache bench` measures: the same random frames in every store, and one reader for each.

Readers are functions (frames, out) that fill `out` (len(frames), ...) with a field's frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.frames import ZarrFrames, open_frames
from cache.layout import METADATA
from cache.shard_layout import CRC_BYTES, shard_name
from cache.shard_writer import ShardWriter
from cache.shards import ShardedFrames

Reader = Callable[[Sequence[int], NDArray[Any]], object]
LIMIT = "preadv"
LIMIT_OF_TWO, OURS = "preadv, two threads", "vita-cache"
COMPARED = (LIMIT, LIMIT_OF_TWO, OURS)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A video to measure with: real sizes of frame queries and of encoded maps."""

    name: str
    num_frames: int
    fields: tuple[tuple[tuple[int, ...], str], ...]
    """Shape of a frame and dtype, for each field."""

    @property
    def frame_bytes(self) -> int:
        """Of all fields together."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.fields)


def standard_samples(scale: float) -> tuple[Sample, ...]:
    """Frames of 360 x 640 pixels, 3 layers of 100 queries; `scale` multiplies the number of frames."""
    queries = ((3, 100, 256), "<f2")
    return (
        Sample(name="float16", num_frames=max(8, int(48 * scale)), fields=(queries, ((256, 90, 160), "<f2"))),
        Sample(name="int8 R=32", num_frames=max(8, int(192 * scale)), fields=(queries, ((32, 90, 160), "|i1"))),
    )


@dataclass(frozen=True, kw_only=True)
class StoredField:
    """One field in every store, below `folder`: `zarr/`, `raw.bin`, `x.h5`."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def readers(self) -> dict[str, Reader]:
        """By name: the limit first, then ours, then the others."""
        return {
            LIMIT: self._preadv(),
            LIMIT_OF_TWO: _in_two_threads(self._preadv()),
            OURS: open_frames(self.folder / "zarr").read,
            "zarr-python": self._zarr(),
            "h5py": self._h5py(),
            "memmap": self._memmap(),
        }

    def _preadv(self) -> Reader:
        """The bare system call, from the very shards that ours reads, at offsets known beforehand."""
        array = open_frames(self.folder / "zarr")
        assert isinstance(array, ShardedFrames)
        size, per_shard = array.frame_bytes, array.frames_per_shard
        names = [shard_name(shard, len(self.shape)) for shard in range(-(-self.shape[0] // per_shard))]
        files = [os.open(self.folder / "zarr" / name, os.O_RDONLY) for name in names]

        def read(frames: Sequence[int], out: NDArray[Any]) -> None:
            buffer = out.reshape(-1).view(np.uint8).data
            for row, frame in enumerate(frames):
                part = buffer[row * size : (row + 1) * size]
                os.preadv(files[frame // per_shard], [part], frame % per_shard * (size + CRC_BYTES))

        return read

    def _zarr(self) -> Reader:
        metadata = json.loads((self.folder / "zarr" / METADATA).read_bytes())
        return ZarrFrames.of(self.folder / "zarr", metadata).read

    def _h5py(self) -> Reader:
        dataset = h5py.File(self.folder / "x.h5", "r")["x"]

        def read(frames: Sequence[int], out: NDArray[Any]) -> None:
            for row, frame in enumerate(frames):
                dataset.read_direct(out, np.s_[frame], np.s_[row])

        return read

    def _memmap(self) -> Reader:
        mapped = np.memmap(self.folder / "raw.bin", self.dtype, "r", shape=self.shape)

        def read(frames: Sequence[int], out: NDArray[Any]) -> None:
            for row, frame in enumerate(frames):
                out[row] = mapped[frame]

        return read


def _in_two_threads(read: Reader) -> Reader:
    def read_halves(frames: Sequence[int], out: NDArray[Any]) -> None:
        middle = len(frames) // 2
        with ThreadPoolExecutor(max_workers=1) as other:
            second_half = other.submit(read, frames[middle:], out[middle:])
            read(frames[:middle], out[:middle])
            second_half.result()

    return read_halves


def store_field(folder: Path, num_frames: int, frame_shape: tuple[int, ...], dtype: str) -> StoredField:
    """Write random frames to every store; chunks of one frame everywhere."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shape = (num_frames, *frame_shape)
    axes = tuple("TLQC" if len(frame_shape) == 3 else "TX")
    with h5py.File(folder / "x.h5", "w") as file, (folder / "raw.bin").open("wb") as raw:
        dataset = file.create_dataset("x", shape, dtype, chunks=(1, *frame_shape))
        writer = None
        for frame in range(num_frames):
            values = rng.integers(-100, 100, (1, *frame_shape), np.int8).astype(dtype)
            writer = writer or ShardWriter(folder / "zarr", num_frames, values, axes)
            writer.append(values)
            raw.write(values.tobytes())
            dataset[frame] = values[0]
        if writer is not None:
            writer.finish()
    return StoredField(folder=folder, shape=shape, dtype=np.dtype(dtype))
