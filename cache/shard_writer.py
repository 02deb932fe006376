"""The fast writer: frames go straight into standard Zarr v3 shards, in the layout of FORMAT.md.

zarr-python encodes a shard in memory and copies it several times; here a frame is written once, as it comes,
with its checksum, and a shard's index when the shard is full. An interrupted shard has no index: no reader
takes it for whole, and no video that holds one is committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec

from cache.compression import compress, zarr_codecs
from cache.layout import FRAMES_PER_SHARD, fill_value
from cache.shard_layout import CRC_BYTES, crc32c, encode_index, shard_name


class ShardWriter:
    """One array (num_frames, ...) of a video, written frame by frame; memory does not depend on its length."""

    def __init__(
        self, folder: Path, num_frames: int, example: NDArray[Any], axes: tuple[str, ...], *, compressed: bool = False
    ) -> None:
        """`example`: frames (any number, ...) of the array's shape and dtype."""
        shape = (num_frames, *example.shape[1:])
        self._folder, self._num_axes = folder, len(shape)
        self._frames_per_shard = min(FRAMES_PER_SHARD, num_frames)
        self._num_shards, self._compressed = 0, compressed
        self._file: IO[bytes] | None = None
        self._entries: list[tuple[int, int]] = []
        create_array(folder, shape, example.dtype, axes, self._frames_per_shard, compressed=compressed)

    def append(self, frames: NDArray[Any]) -> None:
        """Write the next frames, of the example's shape and dtype."""
        for frame in frames:
            if self._file is None:
                self._file = (self._folder / shard_name(self._num_shards, self._num_axes)).open("wb")
                self._num_shards += 1
            elements = np.ascontiguousarray(frame)
            content = compress(elements) if self._compressed else elements.reshape(-1).view(np.uint8).data
            self._entries.append((self._file.tell(), len(content) + CRC_BYTES))
            self._file.write(content)
            self._file.write(crc32c(content).to_bytes(CRC_BYTES, "little"))
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


def create_array(
    folder: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    axes: tuple[str, ...] | None = None,
    frames_per_shard: int | None = None,
    *,
    compressed: bool = False,
) -> zarr.Array[Any]:
    """An array of the prescribed layout: sharded frame by frame, or one chunk without shards if small."""
    return zarr.create_array(
        store=str(folder),
        shape=shape,
        dtype=dtype,
        chunks=shape if frames_per_shard is None else (1, *shape[1:]),
        shards=None if frames_per_shard is None else (frames_per_shard, *shape[1:]),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=zarr_codecs(compressed),
        fill_value=fill_value(dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=axes,
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def write_array(folder: Path, values: NDArray[Any]) -> None:
    """Store a small array whole."""
    create_array(folder, values.shape, values.dtype)[...] = values
