"""Stage one: run the frozen detector over every video of every split once, into the cache."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cache.codecs import Codec, codec_identity
from cache.codecs.rate_distortion import format_table, write_calibration
from cache.fingerprint import Fingerprint, Provenance
from cache.upload import opened_writer
from cache.writer import CacheWriter
from configs.command import device_name, precision_name
from configs.schema import CodecName, Settings
from extract import room
from extract.calibration import ChosenCodec, calibrate, choose_codec
from extract.checkpoints import weights_sha256
from extract.detector import PADDING_DIVISOR, FrameDetector
from extract.engines import open_detector
from extract.jobs import SplitJobs, open_jobs
from extract.room import TIMED_FRAMES, Workload, require_room
from extract.streaming import extract_videos

EXTRACTION_RECORD = "extraction.json"


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord:
    """What one split's extraction has cost so far, over all sessions."""

    seconds: float = 0.0
    frames: int = 0
    bytes: int = 0


def extract(settings: Settings, only: Sequence[str] = ()) -> None:
    """Extract every split of a config that is not yet in its cache; everything checkable is checked first.

    A remote cache (`cache.path=s3://...`) is uploaded video by video (cache.upload). Raises VitaCacheError for
    unreadable labels, frames, weights, a cache of other content, or a disk without room.
    """
    asked = open_jobs(settings, only)
    detector = _open_detector(settings)
    chosen = choose_codec(settings, detector)
    if chosen.calibration is not None:
        print(format_table(chosen.calibration))
    print(chosen.reason)
    require_room(settings, detector, [Workload.of(jobs) for jobs in asked], chosen)
    wanted = fingerprint(settings, detector, weights_sha256(Path(settings.detector.weights)), chosen.codec)
    for jobs in asked:
        _extract_split(settings, detector, wanted, chosen, jobs)


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
    device = device_name(settings.device)
    precision = precision_name(settings.detector.precision, device)
    detector = open_detector(settings.detector, precision=precision, device=device)
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
    settings: Settings, detector: FrameDetector, wanted: Fingerprint, chosen: ChosenCodec, asked: SplitJobs
) -> None:
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
    ) as writer:
        if chosen.calibration is not None:
            write_calibration(writer.path, chosen.calibration)
        pending = set(writer.pending([job.name for job in asked.jobs]))
        jobs = [job for job in asked.jobs if job.name in pending]
        started = time.perf_counter()
        extract_videos(detector, writer, jobs, settings.detector.batch_frames, title=f"extract {split.name}")
        if not jobs:
            print(f"extract {split.name}: all {len(asked.jobs)} videos are in {split.features} already")
        frames = sum(len(job.files) for job in jobs)
        _add_to_record(writer, time.perf_counter() - started, frames)


def read_record(features: Path) -> ExtractionRecord:
    """Read a cache's extraction cost; zeros where none is written."""
    path = features / EXTRACTION_RECORD
    return ExtractionRecord(**json.loads(path.read_text())) if path.exists() else ExtractionRecord()


def _add_to_record(writer: CacheWriter, seconds: float, frames: int) -> None:
    before, size = read_record(writer.path), writer.total_bytes()
    record = ExtractionRecord(seconds=before.seconds + seconds, frames=before.frames + frames, bytes=size)
    (writer.path / EXTRACTION_RECORD).write_text(json.dumps(asdict(record)))
