"""How much an extraction will write, how long it will take, and whether there is room for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import gettempdir

import torch

from cache.codecs.rate_distortion import Calibration, Distortion
from cache.errors import CacheError
from cache.storage.remote import remote_url
from cache.storage.stores import extraction_store
from cache.upkeep.upload import LOCAL_VIDEOS
from configs.schema import Settings
from configs.splits import SplitPaths
from extract.calibration import ChosenCodec
from extract.detector.frozen import FrameDetector
from extract.frames import decoded_batches
from extract.jobs import SplitJobs, VideoJob

TIMED_FRAMES = 20
FLOAT16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one split still has to extract."""

    split: SplitPaths
    jobs: tuple[VideoJob, ...]

    @property
    def frames(self) -> int:
        """Of all these videos."""
        return sum(len(job.files) for job in self.jobs)

    @classmethod
    def of(cls, asked: SplitJobs) -> Workload:
        """What is asked for and not complete in the split's cache."""
        complete = {name for name, done in extraction_store(asked.split.features).videos() if done}
        return cls(split=asked.split, jobs=tuple(job for job in asked.jobs if job.name not in complete))


@dataclass(frozen=True, kw_only=True)
class FrameCost:
    """What a frame costs with one detector: measured on a few, for any size of frame."""

    query_bytes: int
    channels: int
    seconds_per_pixel: float
    """Of the padded network input."""


def measure_frames(settings: Settings, detector: FrameDetector, work: Sequence[Workload], frames: int) -> FrameCost:
    """Run the detector on black frames, which warms up, then, decoding included, on the start of a video."""
    job = max((job for load in work for job in load.jobs), key=lambda candidate: len(candidate.files))
    batch_frames = min(settings.detector.batch_frames, frames)
    features = detector.features(torch.zeros((batch_frames, 3, *job.attributes.image_hw), dtype=torch.uint8))
    with ThreadPoolExecutor(max_workers=1) as pool:
        batches = (images for _, images in decoded_batches(job.files, batch_frames, pool))
        started, timed = time.perf_counter(), 0
        for images in islice(batches, max(0, -(-frames // batch_frames) - 1)):
            detector.features(images).mask_features_BCHW.cpu()
            timed += len(images)
        seconds = time.perf_counter() - started
    pixels = timed * job.attributes.padded_hw[0] * job.attributes.padded_hw[1]
    return FrameCost(
        query_bytes=features.frame_queries_BLQC[0].numel() * FLOAT16_BYTES,
        channels=features.mask_features_BCHW.shape[1],
        seconds_per_pixel=seconds / pixels if timed else 0.0,
    )


def stored_bytes(jobs: Sequence[VideoJob], location_bytes: float, cost: FrameCost) -> int:
    """Bytes that videos take with a codec that takes `location_bytes` a position of the map."""
    total = 0.0
    for job in jobs:
        map_hw = job.attributes.map_hw
        total += len(job.files) * (cost.query_bytes + map_hw[0] * map_hw[1] * location_bytes)
    return round(total)


def seconds(jobs: Sequence[VideoJob], cost: FrameCost) -> float:
    """Time to extract the videos at the measured speed."""
    sizes = [job.attributes.padded_hw for job in jobs]
    pixels = sum(size[0] * size[1] * len(job.files) for size, job in zip(sizes, jobs, strict=True))
    return pixels * cost.seconds_per_pixel


def local_folder(settings: Settings) -> Path:
    """Where extraction writes: the cache itself, or what lies before an upload."""
    if remote_url(settings.cache.path) is None:
        return Path(settings.cache.path)
    return Path(settings.cache.stage_to or gettempdir())


def free_bytes(path: Path) -> int:
    """Room on the disk where `path` is or will be."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def require_room(settings: Settings, detector: FrameDetector, work: Sequence[Workload], chosen: ChosenCodec) -> None:
    """Refuse to begin an extraction that the disk cannot hold, unless `cache.ignore_space` is set.

    Raises CacheError with the bytes needed and free.
    """
    if settings.cache.ignore_space or not any(load.jobs for load in work):
        return
    cost = measure_frames(settings, detector, work, 1)
    each = chosen.location_bytes(cost.channels)
    sizes = sorted(stored_bytes([job], each, cost) for load in work for job in load.jobs)
    folder = local_folder(settings)
    passes_through = remote_url(settings.cache.path) is not None and settings.cache.stage_to is None
    needed, free = sum(sizes[-LOCAL_VIDEOS:] if passes_through else sizes), free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"the features of {sum(load.frames for load in work)} frames do not fit on the disk",
            where=folder,
            expected=f"{needed / 1e9:.2f} GB",
            got=f"{free / 1e9:.2f} GB free",
            hint="choose a smaller cache.codec or another cache.path (`python -m extract estimate CONFIG` compares "
            "them), or set cache.ignore_space=true",
        )


def print_estimate(
    settings: Settings, detector: FrameDetector, work: Sequence[Workload], calibration: Calibration
) -> None:
    """Print what each split needs with each codec, the free space, and the hours from a timing of 20 frames."""
    cost = measure_frames(settings, detector, work, TIMED_FRAMES)
    for load in work:
        begun = " (continued)" if extraction_store(load.split.features).attributes("") is not None else ""
        minutes = seconds(load.jobs, cost) / 60
        duration = f"{minutes:.1f} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours"
        print(f"{load.split.name}{begun}: {len(load.jobs)} videos, {load.frames} frames, {duration}")
        for label, row in _compared(settings, calibration):
            size = stored_bytes(load.jobs, row.bytes_per_location, cost)
            print(f"  {label:<18} {size / 1e9:9.3f} GB, {size / max(load.frames, 1) / 1e6:.3f} MB a frame")
    folder = local_folder(settings)
    print(f"free: {free_bytes(folder) / 1e9:.1f} GB at {folder}")


def _compared(settings: Settings, calibration: Calibration) -> list[tuple[str, Distortion]]:
    """The codecs that cache.codec can name, and what each of them is."""
    default_step = f"1/{1 / settings.cache.logit_step:g}"
    by_name = [(row.label, row) for row in calibration.rows if row.setting in ("", default_step)]
    automatic = calibration.rows[calibration.chosen]
    return [*reversed(by_name), (f"auto: {automatic.label}", automatic)]
