"""The arrays of one video on their way to disk: frames in, checked, cropped, encoded and written at once.

Frames are encoded and compressed side by side where processors are left: a GPU's detector gives them faster than one
thread encodes them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.errors import CacheError, FeatureError
from cache.layout import AXES, FRAME_QUERIES, MASK_FEATURES, VideoAttributes, crop_map
from cache.storage.shard_writer import ShardWriter

ENCODERS = max(1, min(8, (os.cpu_count() or 2) - 1))
_EXPONENT_16 = np.uint16(0x7C00)


class VideoSink:
    """Takes the frames of one video in order; memory stays at one batch, however long the video."""

    def __init__(self, folder: Path, attributes: VideoAttributes, codec: Codec, num_layers: int) -> None:
        self._folder, self._attributes, self._codec, self._num_layers = folder, attributes, codec, num_layers
        self._writers: tuple[ShardWriter, ShardWriter] | None = None
        self._num_appended = 0
        self._pool = ThreadPoolExecutor(max_workers=ENCODERS, thread_name_prefix="encoder")

    def append(
        self, frame_queries_TLQC: NDArray[np.floating[Any]], mask_features_TCHW: NDArray[np.floating[Any]]
    ) -> None:
        """Add the next T frames: pre-norm queries, and the padded FPN map, which is cropped and encoded here.

        Raises CacheError for shapes that contradict the video's attributes, for frames beyond the declared
        number, and for numbers that are not finite or beyond ±65504, naming video and frame.
        """
        self._check_shapes(frame_queries_TLQC, mask_features_TCHW)
        maps_TCHW = crop_map(mask_features_TCHW, self._attributes.image_hw)
        with np.errstate(over="ignore"):
            queries = frame_queries_TLQC.astype("<f2", copy=False)
        self._refuse_non_finite(queries, frame_queries_TLQC, "frame queries")
        maps = self._encode(maps_TCHW)
        if self._writers is None:
            total = self._attributes.num_frames
            self._writers = (
                ShardWriter(self._folder / FRAME_QUERIES, total, queries, AXES[FRAME_QUERIES]),
                ShardWriter(
                    self._folder / MASK_FEATURES,
                    total,
                    maps,
                    AXES[MASK_FEATURES],
                    compressed=self._codec.compressed,
                    pool=self._pool,
                ),
            )
        for writer, frames in zip(self._writers, (queries, maps), strict=True):
            writer.append(frames)
        self._num_appended += len(queries)

    def finish(self) -> dict[str, int]:
        """Write the rest; returns the checksum of each field's elements.

        Raises CacheError where fewer frames arrived than were declared.
        """
        if self._num_appended != self._attributes.num_frames:
            raise self._error("frames are missing", self._attributes.num_frames, self._num_appended)
        for writer in self._writers or ():
            writer.finish()
        return {field: writer.checksum for field, writer in zip(AXES, self._writers or (), strict=True)}

    def close(self) -> None:
        """Let go of the files, finished or not."""
        self._pool.shutdown()
        for writer in self._writers or ():
            writer.close()

    def _encode(self, maps_TCHW: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """Encode frame by frame, and refuse what cannot be stored."""
        if self._codec.dtype.kind == "f":
            maps = self._codec.encode(maps_TCHW)
            self._refuse_non_finite(maps, maps_TCHW, "mask features")
            return maps
        # Integers no longer show what was not finite.
        self._refuse_non_finite(maps_TCHW, maps_TCHW, "mask features")
        return np.concatenate(list(self._pool.map(self._codec.encode, np.split(maps_TCHW, len(maps_TCHW)))))

    def _check_shapes(self, queries: NDArray[Any], maps: NDArray[Any]) -> None:
        if queries.ndim != 4 or maps.ndim != 4 or len(queries) != len(maps):
            raise self._error("need (T, L, Q, C) and (T, C, H, W)", None, (queries.shape, maps.shape))
        if queries.shape[1] != self._num_layers:
            raise self._error("wrong number of detector layers", self._num_layers, queries.shape[1])
        if maps.shape[2:] != self._attributes.padded_map_hw:
            raise self._error("wrong size of the padded map", self._attributes.padded_map_hw, maps.shape[2:])
        if self._num_appended + len(queries) > self._attributes.num_frames:
            raise self._error("too many frames", self._attributes.num_frames, self._num_appended + len(queries))

    def _refuse_non_finite(self, stored: NDArray[Any], given: NDArray[Any], name: str) -> None:
        for index in range(len(stored)):
            if not _all_finite(stored[index]):
                too_large = given[index].dtype != np.float16 and np.isfinite(given[index]).all()
                what = f"{name} exceed the range of float16, ±65504" if too_large else f"{name} are not finite"
                where = f"video {self._folder.name!r}, frame {self._num_appended + index}"
                hint = "if the detector ran in float16, use bfloat16 or float32; else look at this frame"
                raise FeatureError(what, where=where, hint=hint)

    def _error(self, what: str, expected: object, got: object) -> CacheError:
        return CacheError(what, where=f"video {self._folder.name!r}", expected=expected, got=got)


def _all_finite(values: NDArray[Any]) -> bool:
    if values.dtype == np.float16:  # NumPy has no fast float16: look at the exponents' bits.
        return bool(((values.view(np.uint16) & _EXPONENT_16) != _EXPONENT_16).all())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
