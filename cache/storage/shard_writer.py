"""The fast writer: frames go straight into standard Zarr v3 shards, in the layout of FORMAT.md.

zarr-python encodes a shard in memory and copies it several times; here a frame is written once, as it comes,
with its checksum, and a shard's index when the shard is full. Metadata are written directly too: creating an array
takes zarr-python 2 ms of processor time. An interrupted shard has no index: no reader takes it for whole, and no
video that holds one is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from cache.layout import FRAMES_PER_SHARD, METADATA, fill_value
from cache.storage.compression import compress
from cache.storage.shard_layout import (
    CRC_BYTES,
    array_metadata,
    crc32c,
    encode_index,
    joint_checksum,
    shard_name,
)


class ShardWriter:
    """One array (num_frames, ...) of a video, written frame by frame; memory does not depend on its length."""

    def __init__(
        self,
        folder: Path,
        num_frames: int,
        example: NDArray[Any],
        axes: tuple[str, ...],
        *,
        compressed: bool = False,
        pool: Executor | None = None,
    ) -> None:
        """`example`: frames (any number, ...) of the array's shape and dtype. `pool`: packs them side by side."""
        shape = (num_frames, *example.shape[1:])
        self._folder, self._num_axes = folder, len(shape)
        self._frames_per_shard = min(FRAMES_PER_SHARD, num_frames)
        self._num_shards, self._compressed, self._map = 0, compressed, pool.map if pool else map
        self.checksum = 0
        """Of all elements written so far; see `joint_checksum`."""
        self._file: IO[bytes] | None = None
        self._entries: list[tuple[int, int]] = []
        document = array_metadata(shape, example.dtype, self._frames_per_shard, axes, compressed=compressed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METADATA).write_text(json.dumps(document, indent=2))

    def append(self, frames: NDArray[Any]) -> None:
        """Write the next frames, of the example's shape and dtype."""
        plain = [np.ascontiguousarray(frame).reshape(-1).view(np.uint8).data for frame in frames]
        packed: Iterable[bytes | memoryview] = self._map(compress, frames) if self._compressed else plain
        for elements, content in zip(plain, packed, strict=True):
            checksum = crc32c(content)
            self.checksum = joint_checksum(crc32c(elements) if self._compressed else checksum, self.checksum)
            if self._file is None:
                self._file = (self._folder / shard_name(self._num_shards, self._num_axes)).open("wb")
                self._num_shards += 1
            self._entries.append((self._file.tell(), len(content) + CRC_BYTES))
            self._file.write(content)
            self._file.write(checksum.to_bytes(CRC_BYTES, "little"))
            if len(self._entries) == self._frames_per_shard:
                self.finish()

    def finish(self) -> None:
        """Write the index of the last shard, if it is not full."""
        if self._file is not None:
            self._file.write(encode_index(self._entries, self._frames_per_shard))
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.close()
        self._file, self._entries = None, []


def write_array(folder: Path, values: NDArray[Any]) -> None:
    """Store a small array whole, as one chunk without shards."""
    array = zarr.create_array(
        store=str(folder),
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=fill_value(values.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    array[...] = values
