"""Videos through the detector into a cache: frames are decoded ahead, features are written behind its back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cache.background import BackgroundWriter
from cache.writer import CacheWriter
from extract.detector import FrameDetector
from extract.frames import FrameFile, decoded_batches
from extract.jobs import VideoJob


def extract_videos(
    detector: FrameDetector, writer: CacheWriter, jobs: Sequence[VideoJob], batch_frames: int, title: str
) -> None:
    """Run the detector over whole videos and commit one after another; `title` names the progress bar.

    Videos of equal input size follow each other and share batches. Raises FrameError for unreadable frames and
    CacheError for features that cannot be stored, naming the video.
    """
    ordered = sorted(jobs, key=lambda job: job.attributes.image_hw)
    files = (file for job in ordered for file in job.files)
    with (
        ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1)) as pool,
        tqdm(total=sum(len(job.files) for job in jobs), desc=title, unit="frame", disable=not jobs) as progress,
        BackgroundWriter(writer) as background,
    ):
        batches = decoded_batches(files, batch_frames, pool)
        parts = _video_parts(detector, batches, batch_frames, writer.codec.dtype)
        for job in ordered:
            with background.video(job.name, job.attributes) as sink:
                missing = len(job.files)
                while missing:
                    part = next(parts)
                    sink.append(part.frame_queries_TLQC, part.mask_features_TCHW)
                    missing -= len(part.frame_queries_TLQC)
                    progress.update(len(part.frame_queries_TLQC))


@dataclass(frozen=True, kw_only=True)
class _VideoPart:
    """Features of the next T frames of one video."""

    frame_queries_TLQC: NDArray[np.floating[Any]]
    mask_features_TCHW: NDArray[np.floating[Any]]


def _video_parts(
    detector: FrameDetector, batches: Iterable[tuple[list[FrameFile], Tensor]], batch_frames: int, dtype: np.dtype[Any]
) -> Iterator[_VideoPart]:
    """Features of decoded frames, on the host, cut where one video ends and the next begins."""
    for files, images_BCHW in batches:
        features = detector.features(_filled(images_BCHW, batch_frames))
        queries, maps = features.frame_queries_BLQC[: len(files)], features.mask_features_BCHW[: len(files)]
        # What is stored as float16 is rounded by the device, and half as much crosses to the host.
        queries, maps = queries.half().cpu(), (maps.half() if dtype == np.float16 else maps.float()).cpu()
        start = 0
        for _, files_of_video in groupby(files, key=lambda file: file.group):
            stop = start + len(list(files_of_video))
            yield _VideoPart(
                frame_queries_TLQC=queries[start:stop].numpy(),
                mask_features_TCHW=maps[start:stop].numpy(),
            )
            start = stop


def _filled(images_BCHW: Tensor, batch_frames: int) -> Tensor:
    """Repeat the last image until the batch is full.

    The last bits of features depend on the number of images in a batch, though not on the others nor on the place
    among them. Full batches make them the same wherever an extraction was interrupted and resumed.
    """
    missing = batch_frames - len(images_BCHW)
    return torch.cat([images_BCHW, images_BCHW[-1:].expand(missing, -1, -1, -1)]) if missing else images_BCHW
