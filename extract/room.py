"""How much an extraction will write, how long it will take, and whether there is room for it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import gettempdir

import torch

from cache.codecs.rate_distortion import Calibration, Distortion
from cache.errors import CacheError
from cache.layout import Size, VideoAttributes
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
BYTES_OF_FLOAT16 = 2


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
    """What a frame costs with one detector, whatever its size."""

    query_bytes: int
    channels: int
    seconds_per_pixel: float = 0.0
    """Of the padded network input; 0 where it was not timed."""


def frame_cost(detector: FrameDetector, image_hw: Size, batch_frames: int = 1) -> FrameCost:
    """Run the detector on black frames, which also warms it up."""
    features = detector.features(torch.zeros((batch_frames, 3, *image_hw), dtype=torch.uint8))
    return FrameCost(
        query_bytes=features.frame_queries_BLQC[0].numel() * BYTES_OF_FLOAT16,
        channels=features.mask_features_BCHW.shape[1],
    )


def timed_frame_cost(settings: Settings, detector: FrameDetector, work: Sequence[Workload]) -> FrameCost:
    """As frame_cost, and the time for TIMED_FRAMES from the start of the longest video, decoding included."""
    job = max((job for load in work for job in load.jobs), key=lambda candidate: len(candidate.files))
    batch_frames = min(settings.detector.batch_frames, TIMED_FRAMES)
    cost = frame_cost(detector, job.attributes.image_hw, batch_frames)
    with ThreadPoolExecutor(max_workers=1) as pool:
        batches = (images for _, images in decoded_batches(job.files, batch_frames, pool))
        started, timed = time.perf_counter(), 0
        for images in islice(batches, max(0, -(-TIMED_FRAMES // batch_frames) - 1)):
            detector.features(images).mask_features_BCHW.cpu()
            timed += len(images)
        seconds = time.perf_counter() - started
    pixels = timed * math.prod(job.attributes.padded_hw)
    return replace(cost, seconds_per_pixel=seconds / pixels if timed else 0.0)


def stored_bytes(videos: Iterable[VideoAttributes], location_bytes: float, cost: FrameCost) -> int:
    """Bytes that videos take with a codec that takes `location_bytes` a position of the map."""
    frames = ((video.num_frames, math.prod(video.map_hw)) for video in videos)
    return round(sum(count * (cost.query_bytes + locations * location_bytes) for count, locations in frames))


def seconds(videos: Iterable[VideoAttributes], cost: FrameCost) -> float:
    """Time to extract the videos at the measured speed."""
    return sum(video.num_frames * math.prod(video.padded_hw) for video in videos) * cost.seconds_per_pixel


def local_folder(settings: Settings) -> Path:
    """Where extraction writes: the cache itself, or what lies before an upload."""
    if remote_url(settings.cache.path) is None:
        return Path(settings.cache.path)
    return Path(settings.cache.stage_to or gettempdir())


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Room on the disk where `path` is or will be."""
    return shutil.disk_usage(existing_folder(path)).free


def require_bytes(needed: int, folder: Path, num_frames: int, *, hint: str) -> None:
    """Raise CacheError where the features of so many frames need more than is free."""
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"the features of {num_frames} frames do not fit on the disk",
            where=folder,
            expected=f"{needed / 1e9:.2f} GB",
            got=f"{free / 1e9:.2f} GB free",
            hint=f"{hint}, or set cache.ignore_space=true",
        )


def require_room(settings: Settings, detector: FrameDetector, work: Sequence[Workload], chosen: ChosenCodec) -> None:
    """Refuse to begin an extraction that the disk cannot hold, unless `cache.ignore_space` is set.

    Raises CacheError with the bytes needed and free.
    """
    videos = [job.attributes for load in work for job in load.jobs]
    if settings.cache.ignore_space or not videos:
        return
    cost = frame_cost(detector, videos[0].image_hw)
    each = chosen.location_bytes(cost.channels)
    sizes = sorted(stored_bytes([video], each, cost) for video in videos)
    passes_through = remote_url(settings.cache.path) is not None and settings.cache.stage_to is None
    needed = sum(sizes[-LOCAL_VIDEOS:] if passes_through else sizes)
    hint = "choose a smaller cache.codec or another cache.path (`python -m extract estimate CONFIG` compares them)"
    require_bytes(needed, local_folder(settings), sum(video.num_frames for video in videos), hint=hint)


def print_estimate(
    settings: Settings, detector: FrameDetector, work: Sequence[Workload], calibration: Calibration
) -> None:
    """Print what each split needs with each codec, the free space, and the hours from a timing of 20 frames."""
    cost = timed_frame_cost(settings, detector, work)
    for load in work:
        videos = [job.attributes for job in load.jobs]
        begun = " (continued)" if extraction_store(load.split.features).attributes("") is not None else ""
        minutes = seconds(videos, cost) / 60
        duration = f"{minutes:.1f} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours"
        print(f"{load.split.name}{begun}: {len(load.jobs)} videos, {load.frames} frames, {duration}")
        for label, row in _compared(settings, calibration):
            size = stored_bytes(videos, row.bytes_per_location, cost)
            print(f"  {label:<18} {size / 1e9:9.3f} GB, {size / max(load.frames, 1) / 1e6:.3f} MB a frame")
    folder = local_folder(settings)
    print(f"free: {free_bytes(folder) / 1e9:.1f} GB at {folder}")


def _compared(settings: Settings, calibration: Calibration) -> list[tuple[str, Distortion]]:
    """The codecs that cache.codec can name, and what each of them is."""
    default_step = f"1/{1 / settings.cache.logit_step:g}"
    by_name = [(row.label, row) for row in calibration.rows if row.setting in ("", default_step)]
    automatic = calibration.rows[calibration.chosen]
    return [*reversed(by_name), (f"auto: {automatic.label}", automatic)]
