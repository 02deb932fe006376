"""The fast reader: frames of standard Zarr v3 shards through their index.

zarr-python spends about 1.3 ms of Python on each sharded chunk and reads them one after another (REFERENCE
section 10). The shards that this project writes have one fixed layout, so a clip is a few `preadv` calls that
land in the caller's array.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData

DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1", "uint8": "|u1", "int16": "<i2"}
CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)
FRAMES_PER_CALL = 256
"""Two buffers a frame; the kernel takes 1,024 buffers a call (IOV_MAX)."""


@dataclass(frozen=True, kw_only=True)
class ShardedFrames:
    """An array as FORMAT.md prescribes it: chunks of one frame, crc32c, the index at the end of a shard."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    frames_per_shard: int
    _indexes: dict[int, NDArray[np.uint64]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def recognise(cls, folder: Path, metadata: dict[str, Any]) -> ShardedFrames | None:
        """The array, if its metadata has exactly the prescribed layout, else None."""
        shape = tuple(metadata["shape"])
        if metadata["data_type"] not in DTYPES or len(shape) < 2 or min(shape) < 1:
            return None
        dtype = np.dtype(DTYPES[metadata["data_type"]])
        frames_per_shard = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
        if metadata != metadata | prescribed_metadata(shape, dtype, frames_per_shard, metadata["codecs"]):
            return None
        return cls(folder=folder, shape=shape, dtype=dtype, frames_per_shard=frames_per_shard)

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See frames.FrameArray."""
        out = checked_output(self.shape, self.dtype, frames, out)
        rows = out.view(np.uint8).reshape(len(frames), -1) if frames else np.empty((0, 0), np.uint8)
        crcs = np.empty((len(frames), CRC_BYTES), np.uint8)
        order = sorted(range(len(frames)), key=frames.__getitem__)
        start = 0
        while start < len(order):
            shard = frames[order[start]] // self.frames_per_shard
            stop = start
            while stop < len(order) and frames[order[stop]] // self.frames_per_shard == shard:
                stop += 1
            self._read_shard(shard, frames, order[start:stop], rows, crcs)
            start = stop
        return out

    def _read_shard(
        self,
        shard: int,
        frames: Sequence[int],
        positions: list[int],
        rows: NDArray[np.uint8],
        crcs: NDArray[np.uint8],
    ) -> None:
        try:
            descriptor = os.open(self._file(shard), os.O_RDONLY)
        except OSError as error:
            raise self._corrupt(f"shard cannot be opened: {error.strerror}", frames[positions[0]]) from error
        try:
            offsets = self._offsets(descriptor, shard, [frames[position] for position in positions])
            for run in _runs(offsets, rows.shape[1] + CRC_BYTES):
                chosen = positions[run.start : run.stop]
                buffers = [memoryview(part[p]) for p in chosen for part in (rows, crcs)]
                if not _read_fully(descriptor, buffers, offsets[run.start]):
                    raise self._corrupt("shard ends too early", frames[chosen[0]])
                for position in chosen:  # now, while the bytes are in the processor's cache
                    if google_crc32c.value(rows[position]) != int(crcs[position].view("<u4")[0]):
                        raise self._corrupt("checksum mismatch", frames[position])
        finally:
            os.close(descriptor)

    def _offsets(self, descriptor: int, shard: int, frames: list[int]) -> list[int]:
        """Where the frames' chunks start in the shard's file, in bytes."""
        if shard not in self._indexes:
            self._indexes[shard] = self._read_index(descriptor, shard)
        entries = self._indexes[shard][np.asarray(frames) % self.frames_per_shard]
        chunk_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize + CRC_BYTES
        for frame, (offset, size) in zip(frames, entries, strict=True):
            if offset == ABSENT and size == ABSENT:
                raise self._corrupt("frame was never written", frame)
            if size != chunk_bytes:
                raise self._corrupt(f"chunk of {size} bytes instead of {chunk_bytes}", frame)
        return [int(offset) for offset in entries[:, 0]]

    def _read_index(self, descriptor: int, shard: int) -> NDArray[np.uint64]:
        """The shard's index (frames_per_shard, 2): offset and size of each chunk."""
        index = np.empty((self.frames_per_shard, 2), "<u8")
        crc = np.empty(1, "<u4")
        start = os.fstat(descriptor).st_size - index.nbytes - CRC_BYTES
        first_frame = shard * self.frames_per_shard
        buffers = [memoryview(index.view(np.uint8).reshape(-1)), memoryview(crc.view(np.uint8))]
        if start < 0 or not _read_fully(descriptor, buffers, start):
            raise self._corrupt("shard is shorter than its index", first_frame)
        if google_crc32c.value(index) != int(crc[0]):
            raise self._corrupt("checksum mismatch in the shard's index", first_frame)
        return index

    def _file(self, shard: int) -> Path:
        return self.folder / ".".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    def _corrupt(self, what: str, frame: int) -> CorruptData:
        return corrupt_frame(what, self._file(frame // self.frames_per_shard), self.folder, frame)


def prescribed_metadata(
    shape: tuple[int, ...], dtype: np.dtype[Any], frames_per_shard: int, codecs: Any
) -> dict[str, Any]:
    """The entries of zarr.json that the fast reader relies on; `codecs` is what the array itself states."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    # The byte order of one-byte elements may be left out.
    bytes_codec = {"name": "bytes"} if dtype.itemsize == 1 and {"name": "bytes"} in _inner(codecs) else little
    sharding = {
        "chunk_shape": [1, *shape[1:]],
        "codecs": [bytes_codec, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    chunk_shape = [frames_per_shard, *shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }


def _inner(codecs: Any) -> list[Any]:
    inner = codecs[0].get("configuration", {}).get("codecs", [])
    return inner if isinstance(inner, list) else []


def checked_output(
    array_shape: tuple[int, ...], dtype: np.dtype[Any], frames: Sequence[int], out: NDArray[Any] | None
) -> NDArray[Any]:
    """`out`, or a new array (len(frames), ...), once the frames are known to lie in [0, T)."""
    if frames and not 0 <= min(frames) <= max(frames) < array_shape[0]:
        raise IndexError(f"frames {min(frames)} to {max(frames)} asked of {array_shape[0]}")
    shape = (len(frames), *array_shape[1:])
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous {shape} {dtype}, got {out.shape} {out.dtype}")
    return out


def _runs(offsets: list[int], chunk_bytes: int) -> Iterator[range]:
    """Split sorted chunks into ranges that lie side by side on disk."""
    start = 0
    for stop in range(1, len(offsets) + 1):
        adjacent = stop < len(offsets) and offsets[stop] == offsets[stop - 1] + chunk_bytes
        if not adjacent or stop - start == FRAMES_PER_CALL:
            yield range(start, stop)
            start = stop


def _read_fully(descriptor: int, buffers: list[memoryview], offset: int) -> bool:
    """Fill all buffers from `offset` on; False where the file ends before."""
    while buffers:
        count = os.preadv(descriptor, buffers, offset)
        if count == 0:
            return False
        offset += count
        # The kernel may stop early: beyond 2 GiB, or on network file systems.
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
    return True


def corrupt_frame(what: str, file: Path, folder: Path, frame: int) -> CorruptData:
    """The error for a frame of the array in `folder`, found in `file`."""
    video = folder.parent
    hint = f"delete {video} and run `make extract` again: it extracts only what is missing"
    return CorruptData(what, where=f"{file}: video {video.name!r}, frame {frame}", hint=hint)
