"""Stage one: run the frozen detector over every video of every split once, into the cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cache.codecs import Codec, codec_identity
from cache.codecs.rate_distortion import format_table
from cache.errors import FrameError
from cache.fingerprint import Fingerprint, Provenance
from cache.storage.locks import sweep_locks
from cache.upkeep.upload import opened_writer
from configs.cards import write_cache_card
from configs.schema import CodecName, Settings
from extract import room
from extract.calibration import ChosenCodec, calibrate, choose_codec
from extract.detector.checkpoints import weights_sha256
from extract.detector.engines import configured_detector
from extract.detector.frozen import PADDING_DIVISOR, FrameDetector
from extract.fill import Engine, fill, opened_engine, require_workers
from extract.jobs import SplitJobs, open_jobs
from extract.record import write_skipped
from extract.room import TIMED_FRAMES, Workload, require_room


def extract(settings: Settings, only: Sequence[str] = (), *, clear_dead_locks: bool = False) -> None:
    """Extract every split of a config that is not yet in its cache; everything checkable is checked first.

    A remote cache (`cache.path=s3://...`) is uploaded video by video (cache.upkeep.upload). `clear_dead_locks`: take
    over videos whose writers on other machines are dead. Raises VitaCacheError for unreadable labels, frames, weights,
    a cache of other content, or a disk without room.
    """
    require_workers(settings)
    if settings.extract.threads is not None:
        torch.set_num_threads(settings.extract.threads)
    asked = open_jobs(settings, only)
    detector = _open_detector(settings)
    chosen = choose_codec(settings, detector)
    if chosen.calibration is not None:
        logging.getLogger(__name__).info(format_table(chosen.calibration))  # the report has it too
    print(chosen.reason)
    require_room(settings, detector, [Workload.of(jobs) for jobs in asked], chosen)
    wanted = fingerprint(settings, detector, weights_sha256(Path(settings.detector.weights)), chosen.codec)
    skipped = []
    with opened_engine(settings, detector) as engine:
        for jobs in asked:
            if clear_dead_locks:
                sweep_locks(jobs.split.features, of_other_hosts=True)
            skipped += _extract_split(settings, detector, wanted, chosen, jobs, engine)
    if skipped and not settings.extract.allow_skipped:
        hint = "mend them and run the same command; extract.allow_skipped=true takes this for success"
        raise FrameError(f"{len(skipped)} videos were skipped, such as {skipped[0]}", hint=hint)


def print_estimate(settings: Settings) -> None:
    """Print what an extraction would need, in bytes by codec and in hours; nothing is extracted or stored.

    Speed and bytes are measured on 20 frames, to which the codecs are fitted too.
    """
    work = [Workload.of(jobs) for jobs in open_jobs(settings)]
    if not any(load.jobs for load in work):
        print("nothing to extract: every video is in the cache already")
        return
    detector = _open_detector(settings)
    sample = replace(settings.cache, codec=CodecName.auto, calibration_frames=TIMED_FRAMES)
    _, calibration = calibrate(replace(settings, cache=sample), detector)
    print(format_table(calibration))
    room.print_estimate(settings, detector, work, calibration)


def print_rate_distortion(settings: Settings) -> None:
    """Measure every codec on sample frames of the train split; nothing is extracted or stored."""
    _, calibration = calibrate(settings, _open_detector(settings))
    print(format_table(calibration))


def _open_detector(settings: Settings) -> FrameDetector:
    detector = configured_detector(settings)
    print(detector.report)
    return detector


def fingerprint(settings: Settings, detector: FrameDetector, weights_digest: str, codec: Codec) -> Fingerprint:
    """Compose the fingerprint of a cache with these settings and this detector."""
    return Fingerprint(
        weights_sha256=weights_digest,
        architecture=detector.architecture,
        num_layers=settings.detector.num_layers,
        short_edge=settings.detector.short_edge or 0,
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        padding_divisor=PADDING_DIVISOR,
        precision=detector.precision,
        codec=codec_identity(codec),
    )


def _extract_split(
    settings: Settings,
    detector: FrameDetector,
    wanted: Fingerprint,
    chosen: ChosenCodec,
    asked: SplitJobs,
    engine: Engine,
) -> list[str]:
    """Returns the names of the videos that were skipped."""
    split = asked.split
    with opened_writer(
        split.features,
        settings.cache.stage_to,
        fingerprint=replace(wanted, short_edge=asked.short_edge or 0),
        heads=detector.prediction_heads(),
        codec=chosen.codec,
        labels_json=asked.labels_json,
        provenance=Provenance.gather(
            {"weights": settings.detector.weights, "labels": str(split.labels), "frames": str(split.frames)}
        ),
        calibration=chosen.calibration,
    ) as writer:
        write_cache_card(writer.path, settings, split.name, str(split.frames))
        outcome = fill(writer, asked, engine, f"extract {split.name}")
        write_skipped(writer.path, outcome.skipped)
    return [f"{split.name}/{name}" for name in outcome.skipped]
