"""The fast reader: frames of standard Zarr v3 shards through their index.

zarr-python spends about 1.3 ms of Python on each sharded chunk and reads them one after another (REFERENCE
section 10). The shards that this project writes have one fixed layout, so a clip is a few `preadv` calls that
land in the caller's array. Checksums are taken block by block, while the block is in the processor's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.compression import decompress, max_bytes
from cache.errors import CorruptData
from cache.shard_layout import (
    ABSENT,
    CRC_BYTES,
    DTYPES,
    crc32c,
    decode_index,
    index_bytes,
    is_compressed,
    prescribed_metadata,
    shard_name,
)

BLOCK_BYTES = 1 << 20
"""Read and verified at a time: fits the second-level cache, and a system call's cost vanishes."""
SPLIT_BYTES = 1 << 22
"""From here on two threads share a read, so that checksums cost no time where a core is free."""
FRAMES_PER_CALL = 256
"""Two buffers a frame; the kernel takes 1,024 buffers a call (IOV_MAX)."""


@dataclass(frozen=True, kw_only=True)
class ShardedFrames:
    """An array as FORMAT.md prescribes it: chunks of one frame, crc32c, the index at the end of a shard."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    frames_per_shard: int
    compressed: bool = False
    _indexes: dict[int, list[tuple[int, int]]] = field(default_factory=dict, repr=False, compare=False)

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
        return cls(
            folder=folder,
            shape=shape,
            dtype=dtype,
            frames_per_shard=frames_per_shard,
            compressed=is_compressed(metadata["codecs"]),
        )

    @property
    def frame_bytes(self) -> int:
        """Size of a frame's elements."""
        size: int = self.dtype.itemsize
        for length in self.shape[1:]:
            size *= length
        return size

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See frames.FrameArray."""
        out = checked_output(self.shape, self.dtype, frames, out)
        buffer = out.reshape(-1).view(np.uint8).data
        order = sorted(range(len(frames)), key=frames.__getitem__)
        middle = len(order) // 2 if len(order) * self.frame_bytes >= SPLIT_BYTES else 0
        if middle == 0:
            self._read_rows(frames, order, buffer)
            return out
        with ThreadPoolExecutor(max_workers=1) as other:  # Ends with the call: nothing to lose in a fork.
            second_half = other.submit(self._read_rows, frames, order[middle:], buffer)
            self._read_rows(frames, order[:middle], buffer)
            second_half.result()
        return out

    def _read_rows(self, frames: Sequence[int], order: list[int], buffer: memoryview) -> None:
        """Read those rows of the buffer that `order` names, by ascending frame."""
        start = 0
        while start < len(order):
            shard = frames[order[start]] // self.frames_per_shard
            stop = start + 1
            while stop < len(order) and frames[order[stop]] // self.frames_per_shard == shard:
                stop += 1
            self._read_shard(shard, [(frames[row], row) for row in order[start:stop]], buffer)
            start = stop

    def _read_shard(self, shard: int, wanted: list[tuple[int, int]], buffer: memoryview) -> None:
        """Read (frame, row of the buffer) pairs of one shard, in ascending order of frames."""
        try:
            descriptor = os.open(self._file(shard), os.O_RDONLY)
        except OSError as error:
            raise self._corrupt(f"shard cannot be opened: {error.strerror}", wanted[0][0]) from error
        try:
            entries = self._entries(descriptor, shard, wanted)
            for run in _runs(entries):
                if self.compressed:
                    self._read_compressed(
                        descriptor, entries[run.start : run.stop], wanted[run.start : run.stop], buffer
                    )
                else:
                    self._read_run(descriptor, entries[run.start][0], wanted[run.start : run.stop], buffer)
        finally:
            os.close(descriptor)

    def _read_run(self, descriptor: int, offset: int, wanted: list[tuple[int, int]], buffer: memoryview) -> None:
        """Read frames that lie side by side: one call for a few small frames, several for a large one."""
        size, checksum = self.frame_bytes, 0
        rows = [buffer[row * size : (row + 1) * size] for _, row in wanted]
        stored = bytearray(CRC_BYTES * len(wanted))
        while len(rows[0]) > BLOCK_BYTES:
            block, rows[0] = rows[0][:BLOCK_BYTES], rows[0][BLOCK_BYTES:]
            if not _read_fully(descriptor, [block], offset):
                raise self._corrupt("shard ends too early", wanted[0][0])
            checksum = crc32c(block, checksum)
            offset += BLOCK_BYTES
        crcs = [memoryview(stored)[at : at + CRC_BYTES] for at in range(0, len(stored), CRC_BYTES)]
        buffers = [part for pair in zip(rows, crcs, strict=True) for part in pair]
        if not _read_fully(descriptor, buffers, offset):
            raise self._corrupt("shard ends too early", wanted[0][0])
        for (frame, _), row, crc in zip(wanted, rows, crcs, strict=True):
            if crc32c(row, checksum) != int.from_bytes(crc, "little"):
                raise self._corrupt("checksum mismatch", frame)
            checksum = 0

    def _read_compressed(
        self, descriptor: int, entries: list[tuple[int, int]], wanted: list[tuple[int, int]], buffer: memoryview
    ) -> None:
        """Read compressed frames that lie side by side in one call, then check and unpack each."""
        content = memoryview(bytearray(sum(size for _, size in entries)))
        if not _read_fully(descriptor, [content], entries[0][0]):
            raise self._corrupt("shard ends too early", wanted[0][0])
        for (_, size), (frame, row) in zip(entries, wanted, strict=True):
            chunk, crc, content = content[: size - CRC_BYTES], content[size - CRC_BYTES : size], content[size:]
            if crc32c(chunk) != int.from_bytes(crc, "little"):
                raise self._corrupt("checksum mismatch", frame)
            if not decompress(chunk, buffer[row * self.frame_bytes : (row + 1) * self.frame_bytes]):
                raise self._corrupt("chunk does not unpack to a frame", frame)

    def _entries(self, descriptor: int, shard: int, wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where the frames' chunks lie in the shard's file: (offset, size) in bytes."""
        if shard not in self._indexes:
            self._indexes[shard] = self._read_index(descriptor, shard)
        index, chunk_bytes, entries = self._indexes[shard], self.frame_bytes + CRC_BYTES, []
        for frame, _ in wanted:
            offset, size = index[frame % self.frames_per_shard]
            if offset == ABSENT and size == ABSENT:
                raise self._corrupt("frame was never written", frame)
            if not CRC_BYTES < size <= max_bytes(chunk_bytes) if self.compressed else size != chunk_bytes:
                raise self._corrupt(f"chunk of {size} bytes instead of {chunk_bytes}", frame)
            entries.append((offset, size))
        return entries

    def _read_index(self, descriptor: int, shard: int) -> list[tuple[int, int]]:
        """Offset and size of each chunk of the shard."""
        content = bytearray(index_bytes(self.frames_per_shard))
        start = os.fstat(descriptor).st_size - len(content)
        first_frame = shard * self.frames_per_shard
        if start < 0 or not _read_fully(descriptor, [memoryview(content)], start):
            raise self._corrupt("shard is shorter than its index", first_frame)
        index = decode_index(content)
        if index is None:
            raise self._corrupt("checksum mismatch in the shard's index", first_frame)
        return index

    def _file(self, shard: int) -> str:
        return f"{self.folder}/{shard_name(shard, len(self.shape))}"

    def _corrupt(self, what: str, frame: int) -> CorruptData:
        return corrupt_frame(what, self._file(frame // self.frames_per_shard), self.folder, frame)


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


def _runs(entries: list[tuple[int, int]]) -> Iterator[range]:
    """Split sorted chunks (offset, size) into ranges that lie side by side on disk, a block each or one large chunk."""
    start = filled = 0
    for stop, (offset, size) in enumerate(entries):
        adjacent = stop > 0 and offset == sum(entries[stop - 1])
        if stop > start and (not adjacent or stop - start == FRAMES_PER_CALL or filled + size > BLOCK_BYTES):
            yield range(start, stop)
            start, filled = stop, 0
        filled += size
    if start < len(entries):
        yield range(start, len(entries))


def _read_fully(descriptor: int, buffers: list[memoryview], offset: int) -> bool:
    """Fill all buffers from `offset` on; False where the file ends before."""
    while buffers:
        count = os.preadv(descriptor, buffers, offset)
        if count == 0:
            return False
        offset += count
        # The kernel may stop early: at signals, or on network file systems.
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
    return True


def corrupt_frame(what: str, file: Path | str, folder: Path, frame: int) -> CorruptData:
    """The error for a frame of the array in `folder`, found in `file`."""
    video = folder.parent
    hint = f"delete {video} and run `make extract` again: it extracts only what is missing"
    return CorruptData(what, where=f"{file}: video {video.name!r}, frame {frame}", hint=hint)
