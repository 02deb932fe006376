"""`python -m extract estimate CONFIG`: what an extraction would need, measured on a few frames."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice

from cache.codecs.rate_distortion import Calibration, Distortion, format_table, smallest_faithful
from cache.layout import VideoAttributes
from cache.room import free_bytes
from cache.storage.stores import open_store
from configs.command import device_name
from configs.schema import CodecName, Settings
from extract.batches import BatchRunner
from extract.calibration import calibrate
from extract.decoding import frame_decoder
from extract.detector.engines import configured_detector
from extract.frames import decoded_batches
from extract.jobs import VideoJob, open_jobs
from extract.room import Workload, frame_cost, local_folder, stored_bytes

TIMED_FRAMES = 20


def print_estimate(settings: Settings) -> None:
    """Print what each split needs with each codec, the free space, and the hours; nothing is extracted or stored.

    Speed and bytes are measured on 20 frames or a few more, to which the codecs are fitted too.
    """
    work = [Workload.of(jobs) for jobs in open_jobs(settings)]
    jobs = [job for load in work for job in load.jobs]
    if not jobs:
        print("nothing to extract: every video is in the cache already")
        return
    detector = configured_detector(settings)
    print(detector.report)
    sample = replace(settings.cache, calibration_frames=TIMED_FRAMES)
    _, calibration = calibrate(replace(settings, cache=sample), detector)
    print(format_table(calibration))
    cost = frame_cost(detector, jobs[0].attributes.image_hw)
    decode = frame_decoder(settings.detector.decoder, device_name(settings.device))
    pace = seconds_per_pixel(BatchRunner(detector, settings.detector.batch_frames, decode), jobs)
    for load in work:
        videos = [job.attributes for job in load.jobs]
        begun = " (continued)" if open_store(load.split.features).attributes("") is not None else ""
        print(f"{load.split.name}{begun}: {len(videos)} videos, {load.frames} frames, {_duration(videos, pace)}")
        for label, row, mark in _compared(settings, calibration):
            size = stored_bytes(videos, row.bytes_per_location, cost)
            print(f"{mark} {label:<18} {size / 1e9:9.3f} GB, {size / max(load.frames, 1) / 1e6:.3f} MB a frame")
    folder = local_folder(settings)
    print(f"free: {free_bytes(folder) / 1e9:.1f} GB at {folder}")


def seconds_per_pixel(runner: BatchRunner, jobs: Sequence[VideoJob]) -> float:
    """Time for TIMED_FRAMES or more of the longest video in full batches, by pixels of the padded input."""
    job = max(jobs, key=lambda candidate: len(candidate.files))
    batch_frames = runner.batch_frames(job.attributes.image_hw)
    count = -(-TIMED_FRAMES // batch_frames) * batch_frames
    warm_up = islice(cycle(job.files), count + batch_frames)
    with ThreadPoolExecutor(max_workers=1) as pool:
        batches = decoded_batches(warm_up, runner.batch_frames, pool, runner.decode)
        runner.features(next(batches)[1])
        started = time.perf_counter()
        for _, images in batches:
            runner.features(images).mask_features_BCHW.cpu()
        return (time.perf_counter() - started) / (count * math.prod(job.attributes.padded_hw))


def _duration(videos: Iterable[VideoAttributes], pace: float) -> str:
    seconds = sum(video.num_frames * math.prod(video.padded_hw) for video in videos) * pace
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _compared(settings: Settings, calibration: Calibration) -> list[tuple[str, Distortion, str]]:
    """The codecs that cache.codec can name, what each of them is, and a mark at the one that it names."""
    default_step = f"1/{1 / settings.cache.logit_step:g}"
    wanted = settings.cache.codec.value
    automatic = calibration.rows[smallest_faithful(calibration.rows, calibration.min_mask_iou)]
    named = [(row.codec, row.label, row) for row in calibration.rows if row.setting in ("", default_step)]
    named = [*reversed(named), (CodecName.auto.value, f"auto: {automatic.label}", automatic)]
    return [(label, row, "*" if name == wanted else " ") for name, label, row in named]
