"""`python -m train_head.bench_loader`: clips a second through the data loader, with 0, 1 and 2 worker processes.

Clips of 6 frames of 360 x 640 pixels, float16; the limit is the same bytes through bare preadv in one process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cache.bench_readers import LIMIT, StoredField, standard_samples, store_fields
from cache.frames import open_frames
from train_head.clips import read_into_tensor

CLIP_FRAMES, CLIPS, EPOCHS = 6, 48, 4


class RandomClips(Dataset[list[torch.Tensor]]):
    """Clip i: six random frames of all fields of one video."""

    def __init__(self, fields: Sequence[StoredField]) -> None:
        self.arrays = [open_frames(field.folder / "zarr") for field in fields]

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        """Read clip number `index`."""
        return [read_into_tensor(array, clip_frames(index, array.shape[0])) for array in self.arrays]

    def __len__(self) -> int:
        return CLIPS


def clip_frames(index: int, num_frames: int) -> list[int]:
    """Six different frames in ascending order."""
    chosen = np.random.default_rng(index).choice(num_frames, CLIP_FRAMES, replace=False)
    return sorted(chosen.tolist())


def clips_per_second(dataset: RandomClips, workers: int) -> tuple[float, float]:
    """Of a data loader's first epoch, which verifies checksums, and of the best later one; its start not counted."""
    context = "forkserver" if workers else None
    loader = DataLoader(
        dataset, None, num_workers=workers, multiprocessing_context=context, persistent_workers=workers > 0
    )
    speeds = []
    for _ in range(EPOCHS):
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        started = time.perf_counter()
        count = sum(1 for _ in batches)
        speeds.append(count / (time.perf_counter() - started))
    return speeds[0], max(speeds[1:])


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
    with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
        fields = store_fields(standard_samples(1.0)[0], Path(folder))
        bare = limit(fields)
        print(f"{bare:8.1f} clips/s  bare preadv")
        for workers in (0, 1, 2):
            first, later = clips_per_second(RandomClips(fields), workers)
            print(f"{later:8.1f} clips/s  {workers} workers, {later / bare:.2f} of preadv (first epoch {first:.1f})")


if __name__ == "__main__":
    main()
