"""Videos through the detector into a cache: frames are decoded ahead, features are written behind its back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
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
from extract.frames import frame_batches


def extract_videos(
    settings: Settings,
    detector: FrameDetector,
    writer: CacheWriter,
    frames_folder: Path,
    videos: Sequence[Video],
    title: str,
) -> None:
    """Run the detector over whole videos, one after another, and commit each; `title` names the progress bar.

    Raises FrameError for unreadable frames and CacheError for features that cannot be stored, naming the video.
    """
    total = sum(video.length for video in videos)
    with (
        ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1)) as pool,
        tqdm(total=total, desc=title, unit="frame", disable=not videos) as progress,
        BackgroundWriter(writer) as background,
    ):
        for video in videos:
            attributes = video_attributes(settings, video)
            batches = frame_batches(video, frames_folder, attributes.image_hw, settings.detector.batch_frames, pool)
            with background.video(video_group_name(video.id), attributes) as sink:
                for images in batches:
                    features = detector.features(images)
                    # What is stored as float16 is rounded by the device, and half as much crosses to the host.
                    maps_BCHW = features.mask_features_BCHW
                    maps_BCHW = maps_BCHW.half() if writer.codec.dtype == np.float16 else maps_BCHW.float()
                    sink.append(_on_host(features.frame_queries_BLQC.half()), _on_host(maps_BCHW))
                    progress.update(len(images))


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


def _on_host(tensor: Tensor) -> NDArray[np.floating[Any]]:
    array: NDArray[np.floating[Any]] = tensor.cpu().numpy()
    return array
