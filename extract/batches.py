"""Batches through the detector: always full, and smaller ones where memory is short."""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor

from cache.errors import ConfigError, is_out_of_memory
from extract.decoding import Decode
from extract.detector.frozen import FrameDetector, FrameFeatures
from extract.frames import FrameFile


class BatchRunner:
    """A detector that always sees `batch_frames` images at a time, from any thread, one batch after another.

    The last bits of features depend on the number of images in a batch, though not on the others nor on the place
    among them. Full batches make them the same wherever an extraction was interrupted, resumed or divided.
    """

    def __init__(self, detector: FrameDetector, batch_frames: int, decode: Decode = FrameFile.load) -> None:
        self.detector, self.batch_frames, self.decode = detector, batch_frames, decode
        self._turn = threading.Lock()

    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        """Features of any number of images of one size, see FrameDetector.

        Where memory does not suffice, batches are halved from then on. Raises ConfigError where one image is
        too much.
        """
        with self._turn:
            while True:
                try:
                    return self._in_batches(images_BCHW)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                self._halve(images_BCHW)  # Where the failed batch's tensors are gone: they hung on the error.

    def _in_batches(self, images_BCHW: Tensor) -> FrameFeatures:
        starts = range(0, len(images_BCHW), self.batch_frames)
        parts = [self._batch(images_BCHW[start : start + self.batch_frames]) for start in starts]
        queries, maps = [part.frame_queries_BLQC for part in parts], [part.mask_features_BCHW for part in parts]
        count = len(images_BCHW)
        return FrameFeatures(
            frame_queries_BLQC=(torch.cat(queries) if len(parts) > 1 else queries[0])[:count],
            mask_features_BCHW=(torch.cat(maps) if len(parts) > 1 else maps[0])[:count],
        )

    def _batch(self, images_BCHW: Tensor) -> FrameFeatures:
        """Repeats the last image until the batch is full."""
        missing = self.batch_frames - len(images_BCHW)
        repeated = images_BCHW[-1:].expand(missing, -1, -1, -1)
        return self.detector.features(torch.cat([images_BCHW, repeated]) if missing else images_BCHW)

    def _halve(self, images_BCHW: Tensor) -> None:
        size = f"{images_BCHW.shape[3]}x{images_BCHW.shape[2]}"
        if self.batch_frames == 1:
            hint = "set a smaller detector.short_edge, or extract on a machine or GPU with more memory"
            raise ConfigError(f"out of memory: the detector needs more for one frame of {size}", hint=hint)
        before, self.batch_frames = self.batch_frames, self.batch_frames // 2
        print(
            f"out of memory: {before} frames of {size} at a time are too many; going on with {self.batch_frames} "
            f"(detector.batch_frames={self.batch_frames} begins so). The last bits of features depend on it.",
            file=sys.stderr,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
