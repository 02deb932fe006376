"""Videos through the detector into a cache: frames are decoded ahead, features are written behind its back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cache.annotations import Video
from cache.background import BackgroundWriter
from cache.geometry import network_size
from cache.layout import VideoAttributes, video_group_name
from cache.writer import CacheWriter
from configs.schema import Settings
from extract.detector import PADDING_DIVISOR, FrameDetector
from extract.frames import FrameFile, decoded_batches, frame_files


def extract_videos(
    settings: Settings,
    detector: FrameDetector,
    writer: CacheWriter,
    frames_folder: Path,
    videos: Sequence[Video],
    title: str,
) -> None:
    """Run the detector over whole videos and commit one after another; `title` names the progress bar.

    Videos of equal input size follow each other and share batches. Raises FrameError for unreadable frames and
    CacheError for features that cannot be stored, naming the video.
    """
    attributes = {video.id: video_attributes(settings, video) for video in videos}
    ordered = sorted(videos, key=lambda video: attributes[video.id].image_hw)
    files = (file for video in ordered for file in frame_files(video, frames_folder, attributes[video.id].image_hw))
    with (
        ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1)) as pool,
        tqdm(total=sum(video.length for video in videos), desc=title, unit="frame", disable=not videos) as progress,
        BackgroundWriter(writer) as background,
    ):
        batches = decoded_batches(files, settings.detector.batch_frames, pool)
        parts = _video_parts(detector, batches, settings.detector.batch_frames, writer.codec.dtype)
        for video in ordered:
            with background.video(video_group_name(video.id), attributes[video.id]) as sink:
                missing = video.length
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
        for _, files_of_video in groupby(files, key=lambda file: file.video.id):
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


def video_attributes(settings: Settings, video: Video) -> VideoAttributes:
    """Sizes of a video as the detector will see it."""
    original_hw = (video.height, video.width)
    image_hw = network_size(original_hw, settings.detector.short_edge)
    return VideoAttributes(
        num_frames=video.length,
        image_hw=image_hw,
        padded_hw=(padded(image_hw[0]), padded(image_hw[1])),
        original_hw=original_hw,
    )


def padded(edge: int) -> int:
    """An edge of the network input with its padding, in pixels."""
    return -(-edge // PADDING_DIVISOR) * PADDING_DIVISOR
