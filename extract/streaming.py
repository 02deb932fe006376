"""Videos through the detector into a cache: frames are decoded ahead, features written in the background."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.background import BackgroundWriter
from cache.errors import CacheError, FeatureError, FrameError, VideoBusy, VitaCacheError
from cache.writer import CacheWriter
from extract.batches import BatchRunner
from extract.frames import FrameFile, decoded_batches
from extract.jobs import VideoJob

Advance = Callable[[int], object]
"""Is told how many frames more are done."""

Item = TypeVar("Item")

UNREADABLE = (FrameError, FeatureError)
"""What is wrong with one video and no other."""


@dataclass(kw_only=True)
class Outcome:
    """What did not get into the cache: videos that other processes write, and those left out, and why."""

    busy: dict[str, VideoBusy] = field(default_factory=dict)
    skipped: dict[str, VitaCacheError] = field(default_factory=dict)


def extract_videos(
    runner: BatchRunner, writer: CacheWriter, jobs: Sequence[VideoJob], advance: Advance
) -> dict[str, VideoBusy]:
    """Run the detector over whole videos and commit one after another; returns those that other processes write.

    Videos of equal input size follow each other and share batches. A video is claimed before its first frame is
    read. Raises FrameError for unreadable frames and CacheError for features that cannot be stored, naming the video.
    """
    by_name = {job.name: job for job in jobs}
    busy: dict[str, VideoBusy] = {}
    with (
        writer.claims() as claim,
        ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1)) as pool,
        BackgroundWriter(writer) as background,
    ):
        files = _claimed_files(claim, sorted(jobs, key=lambda job: job.attributes.image_hw), busy)
        batches = decoded_batches(files, runner.batch_frames, pool, runner.decode)
        parts = _video_parts(runner, batches, writer.codec.dtype)
        for first in parts:
            job = by_name[first.group]
            missing = len(job.files)
            with background.video(job.name, job.attributes) as sink:
                for part in chain((first,), parts):
                    sink.append(part.frame_queries_TLQC, part.mask_features_TCHW)
                    advance(len(part.frame_queries_TLQC))
                    missing -= len(part.frame_queries_TLQC)
                    if not missing:
                        break
    return busy


def extract_readable_videos(
    runner: BatchRunner, writer: CacheWriter, jobs: Sequence[VideoJob], advance: Advance
) -> Outcome:
    """As extract_videos, but a video that cannot be read is left out, and the others are extracted."""
    outcome = Outcome()
    while jobs:
        try:
            outcome.busy |= extract_videos(runner, writer, jobs, advance)
            break
        except UNREADABLE:  # Of one of the first that are still missing: its neighbours were begun with it.
            jobs = _missing(writer, jobs, outcome)
        for job in jobs:
            try:
                outcome.busy |= extract_videos(runner, writer, [job], advance)
            except UNREADABLE as error:
                found = give_up(writer, job.name, error)
                if isinstance(found, VideoBusy):
                    outcome.busy[job.name] = found
                elif found is not None:
                    outcome.skipped[job.name] = found
                break
        jobs = _missing(writer, jobs, outcome)
    return outcome


def give_up(writer: CacheWriter, name: str, error: VitaCacheError) -> VitaCacheError | None:
    """Remove what is left of a video that cannot be read; returns why it is not in the cache, None where it is."""
    try:
        writer.discard(name)
    except VideoBusy as busy:  # Another extractor has taken it up meanwhile ...
        return busy
    except CacheError:  # ... and could even read it.
        return None
    return error


def _missing(writer: CacheWriter, jobs: Sequence[VideoJob], outcome: Outcome) -> list[VideoJob]:
    missing = set(writer.pending([job.name for job in jobs])) - outcome.busy.keys() - outcome.skipped.keys()
    return sorted((job for job in jobs if job.name in missing), key=lambda job: job.attributes.image_hw)


def _claimed_files(
    claim: Callable[[str], bool], jobs: Iterable[VideoJob], busy: dict[str, VideoBusy]
) -> Iterator[FrameFile]:
    for job in jobs:
        try:
            claimed = claim(job.name)
        except VideoBusy as error:
            busy[job.name] = error
            continue
        if claimed:
            yield from job.files


@dataclass(frozen=True, kw_only=True)
class _VideoPart:
    """Features of the next T frames of one group of the cache."""

    group: str
    frame_queries_TLQC: NDArray[np.floating[Any]]
    mask_features_TCHW: NDArray[np.floating[Any]]


def _video_parts(
    runner: BatchRunner, batches: Iterable[tuple[list[FrameFile], Tensor]], dtype: np.dtype[Any]
) -> Iterator[_VideoPart]:
    """Features of decoded frames, on the host, cut where one video ends and the next begins."""
    for files, queries_BLQC, maps_BCHW, copied in _one_late(_copies(runner, batches, dtype)):
        if copied is not None:
            copied.synchronize()
        start = 0
        for group, files_of_video in groupby(files, key=lambda file: file.group):
            stop = start + len(list(files_of_video))
            yield _VideoPart(
                group=group,
                frame_queries_TLQC=queries_BLQC[start:stop].numpy(),
                mask_features_TCHW=maps_BCHW[start:stop].numpy(),
            )
            start = stop


def _copies(
    runner: BatchRunner, batches: Iterable[tuple[list[FrameFile], Tensor]], dtype: np.dtype[Any]
) -> Iterator[tuple[list[FrameFile], Tensor, Tensor, torch.cuda.Event | None]]:
    """Features on their way to the host, from CUDA into pinned memory; they are there after the event."""
    for files, images_BCHW in batches:
        features = runner.features(images_BCHW)
        queries, maps = features.frame_queries_BLQC, features.mask_features_BCHW
        # What is stored as float16 is rounded by the device, and half as much crosses to the host.
        queries, maps = queries.half(), maps.half() if dtype == np.float16 else maps.float()
        queries_on_host, maps_on_host = (tensor.to("cpu", non_blocking=True) for tensor in (queries, maps))
        copied = torch.cuda.current_stream().record_event() if maps.is_cuda else None
        yield files, queries_on_host, maps_on_host, copied


def _one_late(items: Iterable[Item]) -> Iterator[Item]:
    """Each item when the next one has begun, so that a device never waits; the last one too if there is an error."""
    waiting: deque[Item] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > 1:
                yield waiting.popleft()
    except UNREADABLE:
        yield from waiting
        raise
    yield from waiting
