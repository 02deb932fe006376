"""`python -m train_head.bench_loader`: clips a second through the data loader, with 0, 1 and 2 worker processes.

Clips of 6 frames of 360 x 640 pixels, float16; the limit is the same bytes through bare preadv in one process.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cache.bench_readers import LIMIT, Sample, standard_samples, store_field
from cache.frames import open_frames
from train_head.clips import read_into_tensor

CLIP_FRAMES, CLIPS = 6, 48


class RandomClips(Dataset[list[torch.Tensor]]):
    """Clip i: six random frames of both fields of one video."""

    def __init__(self, folders: list[Path], num_frames: int) -> None:
        self.folders, self.num_frames = folders, num_frames

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        """Read clip number `index`."""
        frames = clip_frames(index, self.num_frames)
        return [read_into_tensor(open_frames(folder), frames) for folder in self.folders]

    def __len__(self) -> int:
        return CLIPS


def clip_frames(index: int, num_frames: int) -> list[int]:
    """Six different frames in ascending order."""
    chosen = np.random.default_rng(index).choice(num_frames, CLIP_FRAMES, replace=False)
    return sorted(chosen.tolist())


def clips_per_second(dataset: RandomClips, workers: int) -> float:
    """Speed of a data loader, its start not counted."""
    context = "forkserver" if workers else None
    loader = DataLoader(dataset, None, num_workers=workers, multiprocessing_context=context, prefetch_factor=None)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count / (time.perf_counter() - started)


def limit(sample: Sample, folder: Path) -> float:
    """Clips a second of bare preadv into one buffer."""
    stored = [
        store_field(folder / str(index), sample.num_frames, shape, dtype)
        for index, (shape, dtype) in enumerate(sample.fields)
    ]
    readers = [field.readers()[LIMIT] for field in stored]
    buffers = [np.zeros((CLIP_FRAMES, *field.shape[1:]), field.dtype) for field in stored]
    times = []
    for index in range(CLIPS):
        started = time.perf_counter()
        for read, buffer in zip(readers, buffers, strict=True):
            read(clip_frames(index, sample.num_frames), buffer)
        times.append(time.perf_counter() - started)
    return 1 / float(np.median(times))


def main() -> None:
    """Measure and print."""
    sample = standard_samples(1.0)[0]
    with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
        bare = limit(sample, Path(folder))
        print(f"{bare:8.1f} clips/s  bare preadv")
        dataset = RandomClips([Path(folder) / str(index) / "zarr" for index in range(2)], sample.num_frames)
        for workers in (0, 1, 2):
            speed = max(clips_per_second(dataset, workers) for _ in range(3))
            print(f"{speed:8.1f} clips/s  {workers} workers, {speed / bare:.2f} of preadv")


if __name__ == "__main__":
    main()
