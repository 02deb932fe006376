"""`python -m train_head.bench.loader`: clips a second through the data loader, with 0, 1, 2 ... worker processes.

Clips of 6 frames of 360 x 640 pixels, float16, with the labels of 4 objects of 720p: everything that a training step
is given. The limit is the same features, without labels, through bare preadv in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cache.bench.readers import LIMIT, StoredField, standard_samples, store_fields
from cache.bench.reading import machine
from cache.labels.annotations import parse_labels
from cache.media.geometry import Transform
from cache.storage.frames import open_frames
from train_head.bench.problem import VIDEO_FRAMES, Problem, bench_labels
from train_head.data.clip_labels import read_targets, remembered_mask
from train_head.data.clip_loader import Empty, load_clips, usual_workers
from train_head.data.clips import USUAL_OBJECTS
from train_head.losses.targets import ClipTargets

CLIP_FRAMES, CLIPS, ROUNDS = 6, 48, 3
IMAGE_HW, LABEL_HW = (360, 640), (720, 1280)


class RandomClips:
    """Clip i: six random frames of all fields of one video, and their labels."""

    def __init__(self, fields: Sequence[StoredField]) -> None:
        self.arrays = [open_frames(field.folder / "zarr") for field in fields]
        frame_bytes = sum(field.dtype.itemsize * math.prod(field.shape[1:]) for field in fields)
        self.clip_bytes = CLIP_FRAMES * (frame_bytes + USUAL_OBJECTS * math.prod(IMAGE_HW))
        self.labels = parse_labels(bench_labels(Problem(image_hw=LABEL_HW)), "benchmark")

    def read(self, index: int, empty: Empty) -> tuple[list[torch.Tensor], ClipTargets]:
        """Read clip number `index`."""
        frames = [clip_frames(index % CLIPS, array.shape[0]) for array in self.arrays]
        outputs = [empty((CLIP_FRAMES, *array.shape[1:]), array.dtype) for array in self.arrays]
        for array, wanted, out in zip(self.arrays, frames, outputs, strict=True):
            array.read(wanted, out)
        labelled = [frame % VIDEO_FRAMES for frame in frames[0]]
        resize = [Transform.resize(LABEL_HW, IMAGE_HW)] * CLIP_FRAMES
        targets = read_targets(self.labels, 1, labelled, resize, empty, remembered_mask)
        return [torch.from_numpy(out) for out in outputs], targets


def clip_frames(index: int, num_frames: int) -> list[int]:
    """Six different frames in ascending order."""
    chosen = np.random.default_rng(index).choice(num_frames, CLIP_FRAMES, replace=False)
    return sorted(chosen.tolist())


def clips_per_second(clips: RandomClips, workers: int, per_round: int) -> float:
    """The best of some rounds, once the workers have started, checksums are verified, and masks are remembered."""
    rounds, speeds = 1 + ROUNDS, []
    loaded = load_clips(clips, range(rounds * per_round), workers=workers, held=1, device=torch.device("cpu"))
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(per_round):
            next(loaded)
        speeds.append(per_round / (time.perf_counter() - started))
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
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m train_head.bench.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the stored frames and of the clips")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    chosen = parser.parse_args()
    counts = sorted({0, 1, 2, usual_workers(torch.device("cpu")), usual_workers(torch.device("cuda"))})
    facts = machine()
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
        fields = store_fields(standard_samples(chosen.scale)[0], Path(folder))
        bare = limit(fields)
        print(f"{bare:8.1f} clips/s  bare preadv, features alone")
        speeds = {}
        for workers in counts:
            speeds[workers] = clips_per_second(RandomClips(fields), workers, max(4, int(CLIPS * chosen.scale)))
            print(f"{speeds[workers]:8.1f} clips/s  {workers} workers, {speeds[workers] / bare:.2f} of preadv")
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"machine": facts, "preadv": bare, "workers": speeds}, indent=2))


if __name__ == "__main__":
    main()
