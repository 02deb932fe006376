"""Bringing what a cache lacks into it, by this process or by workers, beside other processes that do the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from cache.errors import ConfigError, shown
from cache.layout import SKIPPED
from cache.progress import StageProgress
from cache.room import in_units
from cache.storage.connection import remote_url
from cache.writer import CacheWriter
from configs.command import device_name
from configs.schema import Settings
from extract.batches import BatchRunner
from extract.decoding import frame_decoder
from extract.detector.frozen import FrameDetector
from extract.jobs import SplitJobs, VideoJob
from extract.record import add_to_record
from extract.streaming import Advance, Outcome, extract_readable_videos, extract_videos


class Extractor(Protocol):
    """What brings videos into the cache: this process, or workers."""

    def __call__(self, writer: CacheWriter, jobs: Sequence[VideoJob], advance: Advance) -> Outcome:
        """Extract and commit the videos; tells `advance` of every few frames."""


def require_workers(settings: Settings) -> None:
    """Refuse workers that cannot be had, before any work."""
    if not _has_workers(settings):
        return
    from extract.workers.pool import require_ray

    require_ray()
    if remote_url(settings.cache.path) is not None:
        hint = "extract into a folder that all workers share, then `python -m cache upload`"
        raise ConfigError("workers do not write to an address", where=settings.cache.path, hint=hint)


def _has_workers(settings: Settings) -> bool:
    return (settings.extract.workers or 1) > 1 or settings.extract.ray_address is not None


@contextmanager
def opened_extractor(settings: Settings, detector: FrameDetector) -> Iterator[Extractor]:
    """What the settings ask for; errors are those of extract.workers.pool.hired_crew."""
    skip_errors = settings.extract.skip_errors
    if not _has_workers(settings):
        decode = frame_decoder(settings.detector.decoder, device_name(settings.device))
        runner = BatchRunner(detector, settings.detector.batch_frames, decode)

        def alone(writer: CacheWriter, jobs: Sequence[VideoJob], advance: Advance) -> Outcome:
            if skip_errors:
                return extract_readable_videos(runner, writer, jobs, advance)
            return Outcome(busy=extract_videos(runner, writer, jobs, advance))

        yield alone
        return
    from extract.workers.dispatch import Dispatch
    from extract.workers.pool import hired_crew

    with hired_crew(settings, detector, device_name(settings.device)) as crew:
        yield lambda writer, jobs, advance: Dispatch(crew, writer, jobs, advance).run(skip_errors=skip_errors)


def fill(writer: CacheWriter, asked: SplitJobs, extractor: Extractor, title: str) -> Outcome:
    """Extract what is missing, and say what is still missing in the end, however that comes."""
    jobs, outcome = _missing(writer, asked.jobs), Outcome()
    started, frames = time.perf_counter(), 0
    if not jobs:
        print(f"{title}: all {len(asked.jobs)} videos are in {shown(asked.split.features)} already")
    try:
        with StageProgress(title, unit="frame", total=sum(len(job.files) for job in jobs)) as progress:

            def advance(count: int) -> None:
                nonlocal frames
                frames += count
                progress.advance(count)

            outcome = _extract_missing(writer, jobs, extractor, advance)
    finally:
        with suppress(OSError):  # A full disk, which is not the first to say so.
            add_to_record(writer, time.perf_counter() - started, frames)
        missing = _missing(writer, jobs)
        if missing:
            print(f"{title}: {_what_is_missing(writer, asked, missing, outcome)}", file=sys.stderr)
    return outcome


def _extract_missing(writer: CacheWriter, jobs: Sequence[VideoJob], extractor: Extractor, advance: Advance) -> Outcome:
    """Also take over what others leave while this process works."""
    outcome = extractor(writer, jobs, advance)
    while outcome.busy:
        jobs = [job for job in jobs if job.name in outcome.busy]
        again = extractor(writer, jobs, advance)
        outcome.skipped |= again.skipped
        if again.busy.keys() == outcome.busy.keys():
            break
        outcome.busy = again.busy
    return outcome


def _missing(writer: CacheWriter, jobs: Sequence[VideoJob]) -> list[VideoJob]:
    pending = set(writer.pending([job.name for job in jobs]))
    return [job for job in jobs if job.name in pending]


def _what_is_missing(writer: CacheWriter, asked: SplitJobs, missing: Sequence[VideoJob], outcome: Outcome) -> str:
    total, frames = (sum(len(job.files) for job in some) for some in (asked.jobs, missing))
    size = writer.total_bytes() / (total - frames) * frames if total > frames else 0
    room = f", about {in_units(round(size))}" if size else ""
    text = f"{len(missing)} of {len(asked.jobs)} videos ({frames} frames{room}) are not in the cache yet"
    for busy in list(outcome.busy.values())[:1]:
        text += f"; {len(outcome.busy)} of them are being extracted by others: {busy}"
    if outcome.skipped:
        place = shown(asked.split.features / SKIPPED)
        text += (
            f"\n  {len(outcome.skipped)} of them cannot be read: {place} says why; mended, the same command adds them"
        )
    if len(missing) > len(outcome.skipped) + len(outcome.busy):
        text += "\n  the same command goes on from here"
    return text
