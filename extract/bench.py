"""`python -m extract bench CONFIG`: what decoding, resizing, encoding and writing add to the bare detector."""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from cache.annotations import load_labels
from cache.geometry import network_size
from cache.labels import Video
from cache.writer import CacheWriter
from configs.command import device_name, precision_name
from configs.schema import Settings
from configs.splits import train_split
from extract.calibration import choose_codec
from extract.detector import FrameDetector
from extract.engines import open_detector
from extract.frames import frame_batches
from extract.stage import fingerprint
from extract.streaming import extract_videos

FRAMES = 72
ROUNDS = 5


def bench_extraction(settings: Settings) -> None:
    """Run both on the same frames of the train split in turns; print the best times and their ratio."""
    device = device_name(settings.device)
    precision = precision_name(settings.detector.precision, device)
    detector = open_detector(settings.detector, precision=precision, device=device)
    split = train_split(settings)
    videos = _some_videos(load_labels(split.labels).videos)
    batches = _decoded(settings, split.frames, videos)
    codec = choose_codec(settings, detector).codec
    bare, whole = [], []
    for turn in range(ROUNDS):
        bare.append(_bare(detector, batches))
        with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
            writer = CacheWriter.open(
                Path(folder) / str(turn),
                fingerprint=fingerprint(settings, detector, "", codec),
                heads=detector.prediction_heads(),
                codec=codec,
                labels_json=None,
            )
            started = time.perf_counter()
            extract_videos(settings, detector, writer, split.frames, videos, title="bench")
            whole.append(time.perf_counter() - started)
    frames = sum(video.length for video in videos)
    result = {
        "frames": frames,
        "bare_seconds_per_frame": min(bare) / frames,
        "extraction_seconds_per_frame": min(whole) / frames,
        "overhead": min(whole) / min(bare) - 1,
    }
    print(json.dumps(result, indent=2))


def _some_videos(videos: tuple[Video, ...]) -> list[Video]:
    chosen: list[Video] = []
    while sum(video.length for video in chosen) < FRAMES and len(chosen) < len(videos):
        chosen.append(videos[len(chosen)])
    return chosen


def _decoded(settings: Settings, folder: Path, videos: list[Video]) -> list[Tensor]:
    batches: list[Tensor] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        for video in videos:
            image_hw = network_size((video.height, video.width), settings.detector.short_edge)
            batches += frame_batches(video, folder, image_hw, settings.detector.batch_frames, pool)
    return batches


def _bare(detector: FrameDetector, batches: list[Tensor]) -> float:
    started = time.perf_counter()
    for images in batches:
        detector.features(images).mask_features_BCHW.cpu()  # waits for the device
    return time.perf_counter() - started
