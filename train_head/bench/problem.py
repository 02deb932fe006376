"""A cache of random features of real size, with labels, for `python -m train_head bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.codecs.float16 import Float16
from cache.fingerprint import Fingerprint
from cache.heads import HEAD_SHAPES, DetectorHeads
from cache.labels.masks import encode
from cache.layout import VideoAttributes
from cache.writer import CacheWriter
from configs.load import load_settings
from configs.schema import Settings
from train_head.losses.points import LossPoints

NUM_CATEGORIES, VIDEO_FRAMES, SHORT_EDGE = 40, 10, 360
ITERATIONS = 130_000  # of the published training on YouTube-VIS 2019


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one measured training step; the defaults are an R50 at 360 × 640, as the released VITA."""

    enc_layers: int = 6
    dec_layers: int = 3
    clips: int = 1
    frames: int = 5
    image_hw: tuple[int, int] = (360, 640)
    channels: int = 256
    queries: int = 100
    ffn: int = 2048
    layers: int = 3
    objects: int = 4
    points: int = 12544
    device: str = "cpu"

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """Network input with its padding, in pixels."""
        return -(-self.image_hw[0] // 32) * 32, -(-self.image_hw[1] // 32) * 32

    def cheap_options(self) -> list[str]:
        """All options that change the losses and cost no AP on the demo (LOG.md)."""
        return [
            f"loss.num_points={self.points // 3}",
            f"loss.matching_points={self.points // 6}",
            "loss.oversample=1.5",
            "train.num_layers=1",
        ]

    def settings(self, folder: Path, options: Sequence[str] = ()) -> Settings:
        """Settings of the step, the published losses but for `options`."""
        overrides = [
            f"cache.path={folder}",
            "cache.codec=float16",
            f"runs={folder}",
            f"detector.num_layers={self.layers}",
            f"detector.short_edge={SHORT_EDGE}",
            "data.holdout=0",
            f"device={self.device}",
            f"head.enc_layers={self.enc_layers}",
            f"head.dec_layers={self.dec_layers}",
            f"head.hidden_dim={self.channels}",
            f"head.mask_dim={self.channels}",
            f"head.num_queries={self.queries}",
            f"head.ffn_dim={self.ffn}",
            f"loss.num_points={self.points}",
            "loss.padded_area=background",
            "loss.frame_matching=mask_only",
            f"train.iterations={ITERATIONS}",
            f"train.batch_clips={self.clips}",
            f"train.num_frames={self.frames}",
            f"train.workers={4 if self.device == 'cuda' else 0}",
        ]
        return load_settings("ytvis2019_r50", [*overrides, *options])


def write_bench_cache(folder: Path, problem: Problem) -> None:
    """Write `<folder>/train`: one video of ten frames per clip, discs that move as its objects."""
    rng = np.random.default_rng(0)
    fingerprint = Fingerprint(
        weights_sha256="0" * 64,
        architecture="random",
        num_layers=problem.layers,
        short_edge=SHORT_EDGE,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        padding_divisor=32,
        precision="float32",
    )
    writer = CacheWriter.open(
        folder / "train",
        fingerprint=fingerprint,
        heads=_random_heads(rng, problem.channels),
        codec=Float16(),
        labels_json=json.dumps(bench_labels(problem)).encode(),
    )
    height, width = problem.canvas_hw
    attributes = VideoAttributes(
        num_frames=VIDEO_FRAMES,
        image_hw=problem.image_hw,
        padded_hw=(height, width),
        original_hw=problem.image_hw,
    )
    for video in range(1, problem.clips + 1):
        with writer.video(str(video), attributes) as sink:
            for _ in range(VIDEO_FRAMES):
                queries = rng.standard_normal((1, problem.layers, problem.queries, problem.channels), dtype=np.float32)
                maps = rng.standard_normal((1, problem.channels, height // 4, width // 4), dtype=np.float32)
                sink.append(queries, np.maximum(maps, 0))


def _random_heads(rng: np.random.Generator, channels: int) -> DetectorHeads:
    sizes = {"C": channels, "E": channels, "F": channels, "K+1": 81}
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, symbols in HEAD_SHAPES.items():
        shape = tuple(sizes[symbol] for symbol in symbols)
        arrays[name] = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
    return DetectorHeads(arrays=arrays, category_names=())


def bench_labels(problem: Problem) -> dict[str, object]:
    """YTVIS JSON: discs that move through one video a clip."""
    h, w = problem.image_hw
    numbers = range(1, problem.clips + 1)
    videos = [
        {
            "id": n,
            "height": h,
            "width": w,
            "length": VIDEO_FRAMES,
            "file_names": [f"{n}/{t}.jpg" for t in range(VIDEO_FRAMES)],
        }
        for n in numbers
    ]
    tracks = [
        {
            "id": n * problem.objects + track,
            "video_id": n,
            "category_id": 1 + (7 * track) % NUM_CATEGORIES,
            "iscrowd": 0,
            "height": h,
            "width": w,
            "segmentations": [_disc(problem, track, t) for t in range(VIDEO_FRAMES)],
            "bboxes": [None] * VIDEO_FRAMES,
            "areas": [None] * VIDEO_FRAMES,
        }
        for n in numbers
        for track in range(problem.objects)
    ]
    categories = [{"id": k + 1, "name": f"category {k}"} for k in range(NUM_CATEGORIES)]
    return {"videos": videos, "annotations": tracks, "categories": categories}


def _disc(problem: Problem, track: int, frame: int) -> object:
    h, w = problem.image_hw
    y, x = np.mgrid[:h, :w]
    centre_y, centre_x = h * (0.3 + 0.1 * track), w * (0.1 + 0.2 * track + 0.02 * frame)
    inside = (y - centre_y) ** 2 + (x - centre_x) ** 2 < (h / 5) ** 2
    return encode(inside).to_json()


def in_miniature(problem: Problem) -> Problem:
    """The same step of tiny sizes, for tests."""
    return replace(problem, image_hw=(40, 56), channels=32, queries=10, ffn=64, points=300, enc_layers=2, dec_layers=2)


@dataclass(frozen=True)
class FixedPoints:
    """The same points for every mask and problem."""

    points_P2: Tensor

    def matching_points(self, device: torch.device) -> Tensor:
        """Points (P, 2)."""
        return self.points_P2.to(device)

    def loss_points(self, count: int, device: torch.device) -> LossPoints:
        """No candidates: all of these points, for every mask."""
        points_GS2 = self.points_P2.to(device).expand(count, -1, -1)
        return LossPoints(points_GS2=points_GS2, num_candidates=0, keep=0)
