"""`python -m extract bench CONFIG`: what decoding, resizing, encoding and writing add to the bare detector.

Both sides see the same frames in full batches, in turns. Seconds are the clock's and the processor's: on CPU, work in
background threads costs processor time even where a free core hides it, and other processes disturb the clock alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from cache.bench.reading import machine
from cache.codecs import Codec
from cache.codecs.fit import StatisticsAccumulator
from cache.codecs.float16 import Float16
from cache.codecs.spectral import Spectral
from cache.fingerprint import Fingerprint
from cache.labels.tracks import Video
from cache.layout import View
from cache.writer import CacheWriter
from configs.command import device_name, precision_name
from configs.schema import Settings
from configs.splits import train_split
from extract.batches import BatchRunner
from extract.calibration import choose_codec
from extract.decoding import frame_decoder
from extract.detector.architectures import official_config
from extract.detector.engines import open_detector
from extract.detector.frozen import FrameDetector, TransformersDetector
from extract.detector_masks import predict_queries
from extract.fingerprint import fingerprint
from extract.frames import decoded_batches
from extract.jobs import VideoJob, video_job
from extract.streaming import extract_videos


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is measured: frames and rounds with the config's detector, and at real size."""

    frames: int = 360
    rounds: int = 9
    real_hw: tuple[int, int] = (360, 640)
    real_frames: int = 12  # on a CPU, where each takes a second; else `frames`
    real_rounds: int = 3


SMALL = Amount(frames=8, rounds=1, real_hw=(64, 96), real_frames=1, real_rounds=1)


def bench_extraction(settings: Settings, amount: Amount, output: Path | None = None) -> None:
    """Compare on frames of the train split with the config's detector, then at real size.

    Medians are printed as JSON, with the machine and the commit, and written to `output`.
    """
    device = device_name(settings.device)
    precision = precision_name(settings.detector.precision, device)
    detector = open_detector(settings.detector, precision=precision, device=device)
    split = train_split(settings)
    videos = _some_videos(split.read_labels().videos, amount.frames)
    jobs = [video_job(video, View(), split.frames, settings.detector.short_edge) for video in videos]
    codec = choose_codec(settings, detector).codec
    runner = BatchRunner(detector, settings.detector.batch_frames, frame_decoder(settings.detector.decoder, device))
    wanted = fingerprint(settings, detector, "", codec)
    results = {"config": _compare(runner, jobs, wanted, codec, amount.rounds)}
    results |= _real_size(settings, amount, precision, device)
    document = {"machine": machine() | {"device": device}, "extraction": results}
    print(json.dumps(document, indent=2))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2))


def _real_size(settings: Settings, amount: Amount, precision: str, device: str) -> dict[str, dict[str, float]]:
    """R50 and frames as users have them; on a CPU few: each takes a second."""
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(official_config("r50"))
    detector = TransformersDetector(model, num_layers=3, precision=precision, device=device)
    on_cpu, (height, width) = device == "cpu", amount.real_hw
    count, batch_frames = amount.real_frames if on_cpu else amount.frames, settings.detector.batch_frames
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    names = tuple(f"{number}.jpg" for number in range(count))
    video = Video(id=1, height=height, width=width, length=count, file_names=names)
    results = {}
    with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
        for name in names:
            Image.fromarray(noise).save(Path(folder) / name)
        job = video_job(video, View(), Path(folder), None)
        for codec in (Float16(), _spectral(settings, detector, job)):  # the most bytes, and the most arithmetic
            wanted = replace(fingerprint(settings, detector, "", codec), num_layers=3)
            found = _compare(BatchRunner(detector, batch_frames), [job], wanted, codec, amount.real_rounds)
            results[f"r50 with random weights, {height} x {width}, {codec.name}"] = found
    return results


def _spectral(settings: Settings, detector: FrameDetector, job: VideoJob) -> Spectral:
    """The default codec, fitted to one frame."""
    features, heads = detector.features(job.files[0].load()[None]), detector.prediction_heads()
    accumulator = StatisticsAccumulator(heads.feature_dim)
    embeddings_LQF = predict_queries(heads, features.frame_queries_BLQC[0].cpu().numpy()).embeddings_QF
    accumulator.add(features.mask_features_BCHW.cpu().numpy(), embeddings_LQF)
    step, share = settings.cache.logit_step, settings.cache.identity_share
    return Spectral.fit(accumulator.statistics(), relative_step=step, identity_share=share)


def _compare(
    runner: BatchRunner, jobs: list[VideoJob], wanted: Fingerprint, codec: Codec, rounds: int
) -> dict[str, float]:
    """Both on the same frames in turns, in batches that are always full."""
    batches = _decoded(jobs, runner)
    bare, whole = [], []
    for turn in range(rounds):
        bare.append(_seconds(lambda: _bare(runner, batches)))
        with tempfile.TemporaryDirectory(prefix="vita-cache-bench-") as folder:
            writer = CacheWriter.open(
                Path(folder) / str(turn),
                fingerprint=wanted,
                heads=runner.detector.prediction_heads(),
                codec=codec,
                labels_json=None,
            )
            whole.append(_seconds(partial(extract_videos, runner, writer, jobs, lambda frames: None)))
    frames = sum(len(job.files) for job in jobs)
    result: dict[str, float] = {"frames": frames}
    for place, name in enumerate(("seconds", "processor_seconds")):
        alone, extraction = (median(times[place] for times in side) for side in (bare, whole))
        # Of each round: what disturbs the machine for some seconds then hits both sides of a ratio.
        ratio = median(both[place] / one[place] for one, both in zip(bare, whole, strict=True))
        result |= {
            f"bare_{name}_per_frame": alone / frames,
            f"extraction_{name}_per_frame": extraction / frames,
            f"overhead_{name}": ratio - 1,
        }
    return result


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor in all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def _some_videos(videos: tuple[Video, ...], num_frames: int) -> list[Video]:
    chosen: list[Video] = []
    while sum(video.length for video in chosen) < num_frames and len(chosen) < len(videos):
        chosen.append(videos[len(chosen)])
    return chosen


def _decoded(jobs: list[VideoJob], runner: BatchRunner) -> list[Tensor]:
    files = [file for job in jobs for file in job.files]
    with ThreadPoolExecutor(max_workers=1) as pool:
        return [images for _, images in decoded_batches(files, runner.batch_frames, pool, runner.decode)]


def _bare(runner: BatchRunner, batches: list[Tensor]) -> None:
    for images in batches:
        runner.features(images).mask_features_BCHW[-1, -1, -1, -1].item()  # waits for the device, and copies nothing
