"""Stage one: run the frozen detector over every video of every split once, into the cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from cache.annotations import Labels, Video, load_labels
from cache.codecs import Codec, codec_identity
from cache.codecs.rate_distortion import format_table, write_calibration
from cache.errors import AnnotationError
from cache.fingerprint import Fingerprint, Provenance
from cache.layout import VideoAttributes, video_group_name
from cache.writer import CacheWriter
from configs.command import device_name, precision_name
from configs.schema import Settings
from configs.splits import SplitPaths, all_splits
from extract.calibration import ChosenCodec, calibrate, choose_codec
from extract.checkpoints import weights_sha256
from extract.detector import PADDING_DIVISOR, FrameDetector
from extract.engines import open_detector
from extract.frames import frame_batches, network_size, require_frames

EXTRACTION_RECORD = "extraction.json"


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord:
    """What one split's extraction has cost so far, over all sessions."""

    seconds: float = 0.0
    frames: int = 0
    bytes: int = 0


def extract(settings: Settings, only: Sequence[str] = ()) -> None:
    """Extract every split of a config that is not yet in its cache; everything checkable is checked first.

    Raises VitaCacheError for unreadable labels, frames, weights or a cache of other content.
    """
    splits = [split for split in all_splits(settings) if not only or split.name in only]
    labels = [load_labels(split.labels) for split in splits]
    for split, content in zip(splits, labels, strict=True):
        if not content.videos:
            raise AnnotationError("the label file has no videos", where=split.labels)
        require_frames(content.videos, split.frames)
    detector = _open_detector(settings)
    chosen = choose_codec(settings, detector)
    if chosen.calibration is not None:
        print(format_table(chosen.calibration))
    wanted = fingerprint(settings, detector, weights_sha256(Path(settings.detector.weights)), chosen.codec)
    for split, content in zip(splits, labels, strict=True):
        _extract_split(settings, detector, wanted, chosen, split, content)


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
    settings: Settings,
    detector: FrameDetector,
    wanted: Fingerprint,
    chosen: ChosenCodec,
    split: SplitPaths,
    labels: Labels,
) -> None:
    writer = CacheWriter.open(
        split.features,
        fingerprint=wanted,
        heads=detector.prediction_heads(),
        codec=chosen.codec,
        labels_json=split.labels.read_bytes(),
        provenance=Provenance.gather(
            {"weights": settings.detector.weights, "labels": str(split.labels), "frames": str(split.frames)}
        ),
    )
    if chosen.calibration is not None:
        write_calibration(split.features, chosen.calibration)
    pending = set(writer.pending([video_group_name(video.id) for video in labels.videos]))
    videos = [video for video in labels.videos if video_group_name(video.id) in pending]
    started = time.perf_counter()
    total = sum(video.length for video in videos)
    with (
        ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1)) as pool,
        tqdm(total=total, desc=f"extract {split.name}", unit="frame", disable=not videos) as progress,
    ):
        for video in videos:
            _extract_video(settings, detector, writer, split.frames, video, pool, progress)
    if not videos:
        print(f"extract {split.name}: all {len(labels.videos)} videos are in {split.features} already")
    _add_to_record(split.features, time.perf_counter() - started, total)


def _extract_video(
    settings: Settings,
    detector: FrameDetector,
    writer: CacheWriter,
    frames_folder: Path,
    video: Video,
    pool: ThreadPoolExecutor,
    progress: tqdm[None],
) -> None:
    original_hw = (video.height, video.width)
    image_hw = network_size(original_hw, settings.detector.short_edge)
    attributes = VideoAttributes(
        num_frames=video.length,
        image_hw=image_hw,
        padded_hw=(_padded(image_hw[0]), _padded(image_hw[1])),
        original_hw=original_hw,
    )
    batches = frame_batches(video, frames_folder, image_hw, settings.detector.batch_frames, pool)
    with writer.video(video_group_name(video.id), attributes) as sink:
        for images in batches:
            features = detector.features(images)
            sink.append(
                features.frame_queries_BLQC.float().cpu().numpy(), features.mask_features_BCHW.float().cpu().numpy()
            )
            progress.update(len(images))


def _padded(edge: int) -> int:
    return -(-edge // PADDING_DIVISOR) * PADDING_DIVISOR


def read_record(features: Path) -> ExtractionRecord:
    """Read a cache's extraction cost; zeros where none is written."""
    path = features / EXTRACTION_RECORD
    return ExtractionRecord(**json.loads(path.read_text())) if path.exists() else ExtractionRecord()


def _add_to_record(features: Path, seconds: float, frames: int) -> None:
    before = read_record(features)
    size = sum(file.stat().st_size for file in features.rglob("*") if file.is_file())
    record = ExtractionRecord(seconds=before.seconds + seconds, frames=before.frames + frames, bytes=size)
    (features / EXTRACTION_RECORD).write_text(json.dumps(asdict(record)))
