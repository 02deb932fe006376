"""What `python -m cache bench` measures: the same frames in every store, and one reader for each.

Readers are functions (frames, out) that fill `out` (len(frames), ...) with a field's frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.layout import METADATA
from cache.storage.compression import decompress
from cache.storage.frames import ZarrFrames
from cache.storage.hdf5 import PACKING
from cache.storage.shard_layout import CRC_BYTES, decode_index, index_bytes, shard_name
from cache.storage.shard_writer import ShardWriter
from cache.storage.shards import ShardedFrames

Reader = Callable[[Sequence[int], NDArray[Any]], object]
LIMIT, UNPACKED, OURS, OURS_FIRST = "preadv", "preadv + zstd", "vita-cache", "vita-cache, first read"
COMPARED = (LIMIT, UNPACKED, OURS, OURS_FIRST)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A video to measure with: real sizes of frame queries and of encoded maps."""

    name: str
    num_frames: int
    fields: tuple[tuple[tuple[int, ...], str], ...]
    """Shape of a frame and dtype, for each field."""
    compressed: bool = False
    """Whether the maps are integers of ever weaker planes, and compressed, as the spectral codec's."""

    @property
    def frame_bytes(self) -> int:
        """Of all fields together, as they lie in memory."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.fields)


def standard_samples(scale: float) -> tuple[Sample, ...]:
    """Frames of 360 x 640 pixels, 3 layers of 100 queries; `scale` multiplies the number of frames."""
    queries = ((3, 100, 256), "<f2")
    return (
        Sample(name="float16", num_frames=max(8, int(48 * scale)), fields=(queries, ((256, 90, 160), "<f2"))),
        Sample(name="int8", num_frames=max(8, int(96 * scale)), fields=(queries, ((256, 90, 160), "|i1"))),
        Sample(
            name="spectral",
            num_frames=max(8, int(192 * scale)),
            fields=(queries, ((3300, 12, 20), "|i1")),
            compressed=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class StoredField:
    """One field in every store, below `folder`: `zarr/`, `raw.bin`, `x.h5`."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def readers(self) -> dict[str, Reader]:
        """By name: the limits first, then ours, then the others. Only compressed fields are unpacked."""
        metadata = json.loads((self.folder / "zarr" / METADATA).read_bytes())
        array = self._opened(metadata)
        return {
            LIMIT: self._preadv(array, unpack=False),
            UNPACKED: self._preadv(array, unpack=array.compressed),
            OURS: array.read,
            OURS_FIRST: lambda frames, out: self._opened(metadata).read(frames, out),
            "zarr-python": ZarrFrames.of(self.folder / "zarr", metadata).read,
            "h5py": self._h5py(),
            "memmap": self._memmap(),
        }

    def _opened(self, metadata: dict[str, Any]) -> ShardedFrames:
        array = ShardedFrames.recognise(self.folder / "zarr", metadata)
        assert array is not None
        return array

    def _preadv(self, array: ShardedFrames, *, unpack: bool) -> Reader:
        """One bare system call a frame, of the very bytes that ours reads, at places known beforehand."""
        row_bytes, per_shard, places = array.frame_bytes, array.frames_per_shard, []
        for shard in range(-(-self.shape[0] // per_shard)):
            file = self.folder / "zarr" / shard_name(shard, len(self.shape))
            index = decode_index(file.read_bytes()[-index_bytes(per_shard) :])
            assert index is not None
            descriptor = os.open(file, os.O_RDONLY)
            places += [(descriptor, offset, size - CRC_BYTES) for offset, size in index]

        def read(frames: Sequence[int], out: NDArray[Any]) -> None:
            buffer = out.reshape(-1).view(np.uint8).data
            for row, frame in enumerate(frames):
                descriptor, offset, size = places[frame]
                chunk = buffer[row * row_bytes : row * row_bytes + size]
                os.preadv(descriptor, [chunk], offset)
                if unpack:
                    decompress(bytes(chunk), buffer[row * row_bytes : (row + 1) * row_bytes])

        return read

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


def store_fields(sample: Sample, folder: Path) -> list[StoredField]:
    """Write the sample's fields, each to every store; chunks of one frame everywhere."""
    fields = []
    for index, (frame_shape, dtype) in enumerate(sample.fields):
        place = folder / f"{sample.name}-{index}"
        place.mkdir(parents=True)
        shape = (sample.num_frames, *frame_shape)
        compressed = sample.compressed and dtype == "|i1"
        with h5py.File(place / "x.h5", "w") as file, (place / "raw.bin").open("wb") as raw:
            packing = PACKING if compressed else {}
            dataset = file.create_dataset("x", shape, dtype, chunks=(1, *frame_shape), **packing)
            example, axes = np.empty((1, *frame_shape), dtype), tuple("TXYZ")
            writer = ShardWriter(place / "zarr", sample.num_frames, example, axes, compressed=compressed)
            for frame, values in enumerate(_random_frames(shape, dtype, compressed)):
                writer.append(values[None])
                raw.write(values.tobytes())
                dataset[frame] = values
            writer.finish()
        fields.append(StoredField(folder=place, shape=shape, dtype=np.dtype(dtype)))
    return fields


def _random_frames(shape: tuple[int, ...], dtype: str, decaying: bool) -> Iterator[NDArray[Any]]:
    """Uniform numbers; or planes of ever smaller ones, which Zstandard packs to a third, as the spectral codec's."""
    rng = np.random.default_rng(0)
    num_frames, *frame_shape = shape
    scale = np.geomspace(20, 0.2, frame_shape[0]).reshape(-1, 1, 1)
    for _ in range(num_frames):
        if decaying:
            values = np.rint(rng.laplace(scale=scale, size=frame_shape)).clip(-127, 127)
        else:
            values = rng.integers(-100, 100, frame_shape, np.int8)
        yield values.astype(dtype)
