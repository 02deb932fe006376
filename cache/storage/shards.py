"""The fast reader: frames of standard Zarr v3 shards through their index.

zarr-python spends about 1.3 ms of Python on each sharded chunk and reads them one after another (`python -m cache
bench` measures it). The shards that this project writes have one fixed layout, so a clip is a few `preadv` calls
that land in the caller's array.

A plain chunk's checksum is verified when it is first read, and again when its file has changed (inode, size or time of
modification): bytes in memory do not rot.
What is known of a file travels with the array to forked and spawned processes. A compressed chunk's checksum is
verified at every reading: unpacking costs a hundred times as much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.storage.compression import decompress, max_bytes
from cache.storage.shard_layout import (
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

_BLOCK_BYTES = 1 << 19  # the fastest of 64 KB to 2 MB (LOG.md)


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """What is known of a shard for as long as its file stays as it was."""

    file_state: tuple[int, int, int]
    index: list[tuple[int, int]]
    verified: set[int] = field(default_factory=set)
    """Frames whose checksums were right."""


@dataclass(frozen=True, kw_only=True)
class ShardedFrames:
    """An array as FORMAT.md prescribes it: chunks of one frame, crc32c, the index at the end of a shard."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    frames_per_shard: int
    compressed: bool = False
    _shards: dict[int, _Shard] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def recognise(cls, folder: Path, metadata: Any) -> ShardedFrames | None:
        """The array, if its metadata (any JSON) has exactly the prescribed layout, else None."""
        try:
            shape, dtype = tuple(metadata["shape"]), np.dtype(DTYPES[metadata["data_type"]])
            frames_per_shard = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
            if len(shape) < 2 or any(type(size) is not int or size < 1 for size in (*shape, frames_per_shard)):
                return None
            if metadata != metadata | prescribed_metadata(shape, dtype, frames_per_shard, metadata["codecs"]):
                return None
        except (KeyError, TypeError, IndexError, AttributeError):
            return None
        return cls(
            folder=folder,
            shape=shape,
            dtype=dtype,
            frames_per_shard=frames_per_shard,
            compressed=is_compressed(metadata["codecs"]),
        )

    @cached_property
    def frame_bytes(self) -> int:
        """Size of a frame's elements."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See frames.FrameArray."""
        out = checked_output(self.shape, self.dtype, frames, out)
        buffer = out.reshape(-1).view(np.uint8).data
        wanted = sorted(zip(frames, range(len(frames)), strict=True))
        for number, pairs in groupby(wanted, lambda pair: pair[0] // self.frames_per_shard):
            self._read_shard(number, list(pairs), buffer)
        return out

    def _read_shard(self, number: int, wanted: list[tuple[int, int]], buffer: memoryview) -> None:
        """Read (frame, row of the buffer) pairs of one shard, in ascending order of frames."""
        try:
            descriptor = os.open(self._file(number), os.O_RDONLY)
        except OSError as error:
            raise self._corrupt(f"shard cannot be opened: {error.strerror}", wanted[0][0]) from error
        try:
            shard, size = self._known(descriptor, number), self.frame_bytes
            for frame, row in wanted:
                self._read_frame(descriptor, shard, frame, buffer[row * size : (row + 1) * size])
        finally:
            os.close(descriptor)

    def _read_frame(self, descriptor: int, shard: _Shard, frame: int, row: memoryview) -> None:
        """Fill `row` with a frame's elements."""
        offset, size = shard.index[frame % self.frames_per_shard]
        verified = not self.compressed and frame in shard.verified
        if not verified:
            self._check_place(frame, offset, size, shard.file_state[1])
        chunk = memoryview(bytearray(size - CRC_BYTES)) if self.compressed else row
        checksum = 0
        # What is to be verified is read in blocks that stay in the processor's cache until they are summed up.
        block = len(chunk) if verified else _BLOCK_BYTES
        for start in range(0, len(chunk), block):
            part = chunk[start : start + block]
            if not _read_fully(descriptor, part, offset + start):
                raise self._corrupt("shard ends too early", frame)
            checksum = 0 if verified else crc32c(part, checksum)
        if not verified:
            if os.pread(descriptor, CRC_BYTES, offset + len(chunk)) != checksum.to_bytes(CRC_BYTES, "little"):
                raise self._corrupt("checksum mismatch", frame)
            shard.verified.add(frame)
        if self.compressed and not decompress(chunk, row):
            raise self._corrupt("chunk does not unpack to a frame", frame)

    def _check_place(self, frame: int, offset: int, size: int, file_bytes: int) -> None:
        chunk_bytes = self.frame_bytes + CRC_BYTES
        if offset == ABSENT and size == ABSENT:
            raise self._corrupt("frame was never written", frame)
        if not CRC_BYTES < size <= max_bytes(chunk_bytes) if self.compressed else size != chunk_bytes:
            raise self._corrupt(f"chunk of {size} bytes instead of {chunk_bytes}", frame)
        if offset + size > file_bytes:
            raise self._corrupt("shard ends too early", frame)

    def _known(self, descriptor: int, number: int) -> _Shard:
        """The shard, its index read anew if the file is not the one known."""
        status, shard = os.fstat(descriptor), self._shards.get(number)
        file_state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if shard is None or shard.file_state != file_state:
            index = self._read_index(descriptor, number, status.st_size)
            shard = self._shards[number] = _Shard(file_state=file_state, index=index)
        return shard

    def _read_index(self, descriptor: int, number: int, file_bytes: int) -> list[tuple[int, int]]:
        """Offset and size of each chunk of the shard."""
        size, first_frame = index_bytes(self.frames_per_shard), number * self.frames_per_shard
        content = bytearray(min(size, file_bytes))
        if len(content) < size or not _read_fully(descriptor, memoryview(content), file_bytes - size):
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


def _read_fully(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fill the buffer from `offset` on; False where the file ends before."""
    while count := os.preadv(descriptor, [buffer], offset):
        if count == len(buffer):
            return True
        # The kernel may stop early: at signals, or on network file systems.
        buffer, offset = buffer[count:], offset + count
    return False


def corrupt_frame(what: str, file: Path | str, folder: Path, frame: int) -> CorruptData:
    """The error for a frame of the array in `folder`, found in `file`."""
    video = folder.parent
    hint = f"delete {video} and run `make extract` again: it extracts only what is missing"
    return CorruptData(what, where=f"{file}: video {video.name!r}, frame {frame}", hint=hint)
