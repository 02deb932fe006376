"""How much an extraction will write, and whether there is room for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import torch

from cache.layout import Size, VideoAttributes
from cache.remote_writer import LOCAL_VIDEOS
from cache.room import require_room
from cache.storage.connection import remote_url
from cache.storage.stores import open_store
from configs.schema import Settings
from configs.splits import SplitPaths
from extract.calibration import ChosenCodec
from extract.detector.frozen import FrameDetector
from extract.jobs import SplitJobs, VideoJob

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
        complete = {name for name, done in open_store(asked.split.features).videos() if done}
        return cls(split=asked.split, jobs=tuple(job for job in asked.jobs if job.name not in complete))


@dataclass(frozen=True, kw_only=True)
class FrameCost:
    """What a frame costs with one detector, whatever its size."""

    query_bytes: int
    channels: int


def frame_cost(detector: FrameDetector, image_hw: Size) -> FrameCost:
    """Run the detector on a black frame."""
    features = detector.features(torch.zeros((1, 3, *image_hw), dtype=torch.uint8))
    return FrameCost(
        query_bytes=features.frame_queries_BLQC[0].numel() * BYTES_OF_FLOAT16,
        channels=features.mask_features_BCHW.shape[1],
    )


def stored_bytes(videos: Iterable[VideoAttributes], location_bytes: float, cost: FrameCost) -> int:
    """Bytes that videos take with a codec that takes `location_bytes` a position of the map."""
    frames = ((video.num_frames, math.prod(video.map_hw)) for video in videos)
    return round(sum(count * (cost.query_bytes + locations * location_bytes) for count, locations in frames))


def local_folder(settings: Settings) -> Path:
    """Where extraction writes: the cache itself, or what lies before an upload."""
    if remote_url(settings.cache.path) is None:
        return Path(settings.cache.path)
    return Path(settings.cache.stage_to or gettempdir())


def require_room_for(
    settings: Settings, detector: FrameDetector, work: Sequence[Workload], chosen: ChosenCodec
) -> None:
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
    require_features_fit(needed, local_folder(settings), sum(video.num_frames for video in videos), hint=hint)


def require_features_fit(needed: int, folder: Path, num_frames: int, *, hint: str) -> None:
    """Raise CacheError where the features of so many frames need more than is free."""
    what = f"the features of {num_frames} frames do not fit on the disk"
    require_room(needed, folder, what, hint=f"{hint}, or set cache.ignore_space=true")
