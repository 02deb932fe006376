"""Memory of an extraction does not grow with a video's length: the peak of the whole process, from the kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cache.heads import DetectorHeads
from cache.labels.tracks import Video
from cache.layout import View
from extract.batches import BatchRunner
from extract.detector.checkpoints import LoadReport
from extract.detector.frozen import PIXEL_MEAN, PIXEL_STD, FrameFeatures
from extract.jobs import video_job
from extract.streaming import extract_videos
from tests.cache_samples import NUM_LAYERS, open_writer, random_heads

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MAP_CHANNELS = 64
FRAME_BYTES = 2 * (NUM_LAYERS * 5 * 8 + MAP_CHANNELS * 16 * 16)  # what is stored of a frame, 33 kB


class PixelDetector:
    """A frozen detector of one convolution: enough to extract thousands of frames within seconds."""

    precision = "float32"
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD
    category_names: tuple[str, ...] = ()
    report: LoadReport | None = None
    num_layers = NUM_LAYERS
    architecture = "one convolution"

    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        maps = functional.avg_pool2d(images_BCHW.float(), 4)[:, :1].expand(-1, MAP_CHANNELS, -1, -1)
        queries = maps[:, :NUM_LAYERS, 0, :8, None].expand(-1, -1, -1, 5).transpose(2, 3)
        return FrameFeatures(frame_queries_BLQC=queries.contiguous(), mask_features_BCHW=maps.contiguous())

    def prediction_heads(self) -> DetectorHeads:
        return random_heads()


def peak_megabytes(folder: Path, name: str, num_frames: int) -> float:
    """Extract a video of this many frames; returns the highest resident size meanwhile."""
    video = Video(id=1, width=64, height=64, length=num_frames, file_names=("frame.jpg",) * num_frames)
    writer = open_writer(folder / name)
    CLEAR.write_text("5")
    extract_videos(BatchRunner(PixelDetector(), 8), writer, [video_job(video, View(), folder, None)], lambda _: None)
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


@pytest.mark.skipif(not CLEAR.exists(), reason="the kernel's peak of a process is Linux's")
def test_ten_thousand_frames_take_no_more_memory_than_five_hundred(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.jpg")
    peak_megabytes(tmp_path, "warm", 100)
    short, long = peak_megabytes(tmp_path, "short", 500), peak_megabytes(tmp_path, "long", 10_000)
    grown = 9_500 * FRAME_BYTES / 2**20  # 300 MB, if features were held
    assert long - short < 0.1 * grown
