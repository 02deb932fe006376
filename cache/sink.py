"""The arrays of one video on their way to disk: frames in, whole shards out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from cache.codecs import Codec
from cache.errors import CacheError
from cache.layout import (
    FRAME_QUERIES,
    FRAMES_PER_SHARD,
    MASK_FEATURES,
    VideoAttributes,
    crop_map,
    fill_value,
)


class VideoSink:
    """Collects frames and writes them shard by shard: memory stays at one shard, however long the video."""

    def __init__(self, folder: Path, attributes: VideoAttributes, codec: Codec, num_layers: int) -> None:
        self._folder, self._attributes, self._codec, self._num_layers = folder, attributes, codec, num_layers
        self._writers: tuple[_ShardWriter, _ShardWriter] | None = None
        self._num_appended = 0

    def append(
        self, frame_queries_TLQC: NDArray[np.floating[Any]], mask_features_TCHW: NDArray[np.floating[Any]]
    ) -> None:
        """Add the next T frames: pre-norm queries, and the padded FPN map, which is cropped and encoded here.

        Raises CacheError for shapes that contradict the video's attributes, for frames beyond the declared
        number, and for numbers that are not finite or beyond ±65504, naming video and frame.
        """
        self._check_shapes(frame_queries_TLQC, mask_features_TCHW)
        maps_TCHW = crop_map(mask_features_TCHW, self._attributes.image_hw)
        self._refuse_non_finite(frame_queries_TLQC, "frame queries are not finite")
        self._refuse_non_finite(maps_TCHW, "mask features are not finite")
        with np.errstate(over="ignore"):
            queries = frame_queries_TLQC.astype("<f2")
        maps = self._codec.encode(maps_TCHW)
        self._refuse_non_finite(queries, "frame queries exceed the range of float16, ±65504")
        self._refuse_non_finite(maps, "mask features exceed the range of the codec")
        if self._writers is None:
            total = self._attributes.num_frames
            self._writers = (
                _ShardWriter(self._folder / FRAME_QUERIES, total, queries, ("T", "L", "Q", "C")),
                _ShardWriter(self._folder / MASK_FEATURES, total, maps, ("T", "R", "H", "W")),
            )
        for writer, frames in zip(self._writers, (queries, maps), strict=True):
            writer.append(frames)
        self._num_appended += len(queries)

    def finish(self) -> None:
        """Write the rest. Raises CacheError where fewer frames arrived than were declared."""
        if self._num_appended != self._attributes.num_frames:
            raise self._error("frames are missing", self._attributes.num_frames, self._num_appended)
        for writer in self._writers or ():
            writer.flush()

    def _check_shapes(self, queries: NDArray[Any], maps: NDArray[Any]) -> None:
        if queries.ndim != 4 or maps.ndim != 4 or len(queries) != len(maps):
            raise self._error("need (T, L, Q, C) and (T, C, H, W)", None, (queries.shape, maps.shape))
        if queries.shape[1] != self._num_layers:
            raise self._error("wrong number of detector layers", self._num_layers, queries.shape[1])
        if maps.shape[2:] != self._attributes.padded_map_hw:
            raise self._error("wrong size of the padded map", self._attributes.padded_map_hw, maps.shape[2:])
        if self._num_appended + len(queries) > self._attributes.num_frames:
            raise self._error("too many frames", self._attributes.num_frames, self._num_appended + len(queries))

    def _refuse_non_finite(self, values: NDArray[Any], what: str) -> None:
        if values.dtype.kind != "f":
            return
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not finite.all():
            frame = self._num_appended + int(np.argmin(finite))
            hint = "if the detector ran in float16, use bfloat16 or float32; else look at this frame"
            raise CacheError(what, where=f"video {self._folder.name!r}, frame {frame}", hint=hint)

    def _error(self, what: str, expected: object, got: object) -> CacheError:
        return CacheError(what, where=f"video {self._folder.name!r}", expected=expected, got=got)


class _ShardWriter:
    """One array of a video, buffered to whole shards: a part of one would be read back and written anew."""

    def __init__(self, folder: Path, num_frames: int, example: NDArray[Any], axes: tuple[str, ...]) -> None:
        frame_shape = example.shape[1:]
        self._buffer = np.empty((min(FRAMES_PER_SHARD, num_frames), *frame_shape), example.dtype)
        self._filled = self._written = 0
        self._array = _create_array(folder, (num_frames, *frame_shape), example.dtype, axes, len(self._buffer))

    def append(self, frames: NDArray[Any]) -> None:
        taken = 0
        while taken < len(frames):
            part = frames[taken : taken + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            taken += len(part)
            self._filled += len(part)
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        if self._filled:
            self._array[self._written : self._written + self._filled] = self._buffer[: self._filled]
            self._written, self._filled = self._written + self._filled, 0


def _create_array(
    folder: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    axes: tuple[str, ...] | None = None,
    frames_per_shard: int | None = None,
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
        compressors=[Crc32cCodec()],
        fill_value=fill_value(dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=axes,
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def write_array(folder: Path, values: NDArray[Any]) -> None:
    """Store a small array whole."""
    _create_array(folder, values.shape, values.dtype)[...] = values
