"""Batches through the detector: always full, and smaller ones where memory is short."""

from __future__ import annotations

import math
import sys
import threading

import torch
from torch import Tensor

from cache.errors import ConfigError, is_out_of_memory
from cache.layout import Size
from configs.schema import BATCH_FRAMES
from extract.decoding import Decode
from extract.detector.frozen import FrameDetector, FrameFeatures
from extract.frames import FrameFile

_PIXELS_OF_A_THREAD = 250_000  # More at once makes a CPU no faster (R50, 360x640: .84 s a frame among 2, 4 and 8).


class BatchRunner:
    """A detector that always sees equally many images at a time, from any thread, one batch after another.

    batch_frames: how many; None takes BATCH_FRAMES, and fewer of large ones on a CPU, which need less memory. The last
    bits of features depend on the number of images in a batch, though not on the others nor on the place among them.
    Full batches make them the same wherever an extraction was interrupted, resumed or divided.
    """

    def __init__(self, detector: FrameDetector, batch_frames: int | None, decode: Decode = FrameFile.load) -> None:
        self.detector, self.decode = detector, decode
        self._most = batch_frames or BATCH_FRAMES
        self._on_cpu = batch_frames is None and detector.device.type == "cpu"
        self._turn = threading.Lock()

    def batch_frames(self, image_hw: Size) -> int:
        """How many images of this (height, width) go through the detector at once."""
        if not self._on_cpu:
            return self._most
        fitting = max(1, _PIXELS_OF_A_THREAD * max(2, torch.get_num_threads()) // math.prod(image_hw))
        return min(self._most, 1 << int(math.log2(fitting)))

    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        """Features of any number of images of one size, see FrameDetector.

        Where memory does not suffice, batches are halved from then on. Raises ConfigError where one image is
        too much.
        """
        with self._turn:
            while True:
                try:
                    batch_frames = self.batch_frames((images_BCHW.shape[2], images_BCHW.shape[3]))
                    return self._in_batches(images_BCHW, batch_frames)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                self._halve(images_BCHW, batch_frames)  # Here the failed batch's tensors are gone: the error held them.

    def _in_batches(self, images_BCHW: Tensor, batch_frames: int) -> FrameFeatures:
        parts = [self._batch(images, batch_frames) for images in torch.split(images_BCHW, batch_frames)]
        queries, maps = [part.frame_queries_BLQC for part in parts], [part.mask_features_BCHW for part in parts]
        count = len(images_BCHW)
        return FrameFeatures(
            frame_queries_BLQC=(torch.cat(queries) if len(parts) > 1 else queries[0])[:count],
            mask_features_BCHW=(torch.cat(maps) if len(parts) > 1 else maps[0])[:count],
        )

    def _batch(self, images_BCHW: Tensor, batch_frames: int) -> FrameFeatures:
        """Repeats the last image until the batch is full."""
        missing = batch_frames - len(images_BCHW)
        repeated = images_BCHW[-1:].expand(missing, -1, -1, -1)
        return self.detector.features(torch.cat([images_BCHW, repeated]) if missing else images_BCHW)

    def _halve(self, images_BCHW: Tensor, before: int) -> None:
        size = f"{images_BCHW.shape[3]}x{images_BCHW.shape[2]}"
        if before == 1:
            hint = "set a smaller detector.short_edge, or extract on a machine or GPU with more memory"
            raise ConfigError(f"out of memory: the detector needs more for one frame of {size}", hint=hint)
        self._most = before // 2
        print(
            f"out of memory: {before} frames of {size} at a time are too many; going on with {self._most} "
            f"(detector.batch_frames={self._most} begins so). The last bits of features depend on it.",
            file=sys.stderr,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
