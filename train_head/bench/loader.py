"""`python -m train_head.bench.loader`: clips a second through the data loader, with 0, 1 and 2 worker processes.

Clips of 6 frames of 360 x 640 pixels, float16; the limit is the same bytes through bare preadv in one process.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cache.bench.readers import LIMIT, StoredField, standard_samples, store_fields
from cache.storage.frames import open_frames
from train_head.data.clip_loader import Empty, load_clips

CLIP_FRAMES, CLIPS, ROUNDS = 6, 48, 3


class RandomClips:
    """Clip i: six random frames of all fields of one video."""

    def __init__(self, fields: Sequence[StoredField]) -> None:
        self.arrays = [open_frames(field.folder / "zarr") for field in fields]
        self.clip_bytes = CLIP_FRAMES * sum(field.dtype.itemsize * math.prod(field.shape[1:]) for field in fields)

    def read(self, index: int, empty: Empty) -> list[torch.Tensor]:
        """Read clip number `index`."""
        frames = [clip_frames(index % CLIPS, array.shape[0]) for array in self.arrays]
        outputs = [empty((CLIP_FRAMES, *array.shape[1:]), array.dtype) for array in self.arrays]
        for array, wanted, out in zip(self.arrays, frames, outputs, strict=True):
            array.read(wanted, out)
        return [torch.from_numpy(out) for out in outputs]


def clip_frames(index: int, num_frames: int) -> list[int]:
    """Six different frames in ascending order."""
    chosen = np.random.default_rng(index).choice(num_frames, CLIP_FRAMES, replace=False)
    return sorted(chosen.tolist())


def clips_per_second(clips: RandomClips, workers: int) -> float:
    """The best of some rounds, once the workers have started and checksums are verified."""
    rounds, speeds = 1 + ROUNDS, []
    loaded = load_clips(clips, range(rounds * CLIPS), workers=workers, held=1, device=torch.device("cpu"))
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(CLIPS):
            next(loaded)
        speeds.append(CLIPS / (time.perf_counter() - started))
    return max(speeds[1:])


def limit(fields: Sequence[StoredField]) -> float:
    """Clips a second of bare preadv into one buffer."""
    readers = [field.readers()[LIMIT] for field in fields]
    buffers = [np.zeros((CLIP_FRAMES, *field.shape[1:]), field.dtype) for field in fields]
    times = []
    for index in range(CLIPS):
        started = time.perf_counter()
        for field, read, buffer in zip(fields, readers, buffers, strict=True):
            read(clip_frames(index, field.shape[0]), buffer)
        times.append(time.perf_counter() - started)
    return 1 / float(np.median(times))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m train_head.bench.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the stored frames")
    scale = parser.parse_args().scale
    with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
        fields = store_fields(standard_samples(scale)[0], Path(folder))
        bare = limit(fields)
        print(f"{bare:8.1f} clips/s  bare preadv")
        for workers in (0, 1, 2):
            speed = clips_per_second(RandomClips(fields), workers)
            print(f"{speed:8.1f} clips/s  {workers} workers, {speed / bare:.2f} of preadv")


if __name__ == "__main__":
    main()
