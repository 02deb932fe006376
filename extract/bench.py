"""`python -m extract bench CONFIG`: what decoding, resizing, encoding and writing add to the bare detector.

Both sides see the same frames in turns. Seconds are the clock's and the processor's: on CPU, work in background
threads costs processor time even where a free core hides it, and other processes disturb the clock alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from torch import Tensor

from cache.annotations import load_labels
from cache.labels import Video
from cache.layout import View
from cache.writer import CacheWriter
from configs.command import device_name, precision_name
from configs.schema import Settings
from configs.splits import train_split
from extract.batches import BatchRunner
from extract.calibration import choose_codec
from extract.detector import FrameDetector
from extract.engines import open_detector
from extract.frames import decoded_batches
from extract.jobs import VideoJob, video_job
from extract.stage import fingerprint
from extract.streaming import extract_videos

FRAMES = 72
ROUNDS = 5


def bench_extraction(settings: Settings) -> None:
    """Run both on the same frames of the train split in turns; print medians and their ratio."""
    device = device_name(settings.device)
    precision = precision_name(settings.detector.precision, device)
    detector = open_detector(settings.detector, precision=precision, device=device)
    split = train_split(settings)
    short_edge = settings.detector.short_edge
    videos = _some_videos(load_labels(split.labels).videos)
    jobs = [video_job(video, View(), split.frames, short_edge) for video in videos]
    batches = _decoded(jobs, settings.detector.batch_frames)
    codec = choose_codec(settings, detector).codec
    bare, whole = [], []
    for turn in range(ROUNDS):
        bare.append(_seconds(lambda: _bare(detector, batches)))
        with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
            writer = CacheWriter.open(
                Path(folder) / str(turn),
                fingerprint=fingerprint(settings, detector, "", codec),
                heads=detector.prediction_heads(),
                codec=codec,
                labels_json=None,
            )
            runner = BatchRunner(detector, settings.detector.batch_frames)
            run = partial(extract_videos, runner, writer, jobs, lambda frames: None)
            whole.append(_seconds(run))
    frames = sum(video.length for video in videos)
    result: dict[str, float] = {"frames": frames}
    for place, name in enumerate(("seconds", "processor_seconds")):
        alone, extraction = (median(times[place] for times in side) for side in (bare, whole))
        result |= {
            f"bare_{name}_per_frame": alone / frames,
            f"extraction_{name}_per_frame": extraction / frames,
            f"overhead_{name}": extraction / alone - 1,
        }
    print(json.dumps(result, indent=2))


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor in all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def _some_videos(videos: tuple[Video, ...]) -> list[Video]:
    chosen: list[Video] = []
    while sum(video.length for video in chosen) < FRAMES and len(chosen) < len(videos):
        chosen.append(videos[len(chosen)])
    return chosen


def _decoded(jobs: list[VideoJob], batch_frames: int) -> list[Tensor]:
    files = [file for job in jobs for file in job.files]
    with ThreadPoolExecutor(max_workers=1) as pool:
        return [images for _, images in decoded_batches(files, batch_frames, pool)]


def _bare(detector: FrameDetector, batches: list[Tensor]) -> None:
    for images in batches:
        detector.features(images).mask_features_BCHW.cpu()  # waits for the device
