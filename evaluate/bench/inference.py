"""`python -m evaluate bench`: inference of the head on one video, ours against the plain way, in one run.

R50 sizes, 36 frames of 360×640, one thread, features from memory; the masks of ours come run-length encoded, those of
the other side as pixels. Turns alternate, and processor time counts: what else the machine does disturbs both alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.bench.reading import machine
from cache.labels import masks
from evaluate.bench.dense import DenseTracks, dense_tracks
from evaluate.tracks.inference import VideoTracks, predict_video
from train_head.heads.contract import HeadConfig
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.mask_folding import MapDecoding
from train_head.heads.vita import VitaHead

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class VideoProblem:
    """Sizes of the measured video and head; by default the release's head on R50 features of 360×640."""

    frames: int = 36
    image_hw: tuple[int, int] = (360, 640)
    queries: int = 100
    channels: int = 256
    ffn: int = 2048
    enc_layers: int = 6
    dec_layers: int = 3
    window: int = 6
    top_k: int = 10
    block: int = 16

    def head(self) -> VitaHead:
        """A head of random weights."""
        torch.manual_seed(0)
        config = HeadConfig(
            num_classes=40,
            num_frame_queries=self.queries,
            num_queries=self.queries,
            hidden_dim=self.channels,
            mask_dim=self.channels,
            detector_dim=self.channels,
            map_dim=self.channels,
            ffn_dim=self.ffn,
            enc_layers=self.enc_layers,
            dec_layers=self.dec_layers,
            window=self.window,
        )
        return VitaHead(config).eval()

    def features(self) -> tuple[Tensor, Tensor]:
        """Frame queries (T, Q, C) and a smooth float16 map (T, C, H, W): masks are blobs, as of real detectors."""
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(self.frames, self.queries, self.channels, generator=generator)
        H, W = -(-self.image_hw[0] // 4), -(-self.image_hw[1] // 4)
        coarse = torch.randn(self.frames, self.channels, max(2, H // 10), max(2, W // 10), generator=generator)
        smooth = [F.interpolate(frame[None], size=(H, W), mode="bilinear").relu().half() for frame in coarse]
        return queries, torch.cat(smooth)


SMALL = VideoProblem(image_hw=(16, 24), queries=10, channels=16, ffn=32, enc_layers=2, dec_layers=2, top_k=3)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of processor time by turn, and how far the results lie apart."""

    plain: list[float]
    ours: list[float]
    largest_score_difference: float
    share_of_pixels_that_differ: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return statistics.median(self.plain) / statistics.median(self.ours)


def bench(output: Path | None, problem: VideoProblem) -> int:
    """Measure, print, write JSON to `output`; status 1 where the two sides disagree."""
    torch.set_num_threads(1)
    found = measure(problem, turns=3)
    print("  ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"inference of {problem.frames} frames, {problem.enc_layers} + {problem.dec_layers} layers, 1 thread:")
    print(
        f"plain {statistics.median(found.plain):.2f} s, ours {statistics.median(found.ours):.2f} s: {found.ratio:.1f}x"
    )
    print(
        f"scores differ by at most {found.largest_score_difference:.1e}, "
        f"{found.share_of_pixels_that_differ:.1e} of the pixels differ"
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": machine(), "problem": asdict(problem), **asdict(found)}, indent=2))
    return int(found.largest_score_difference > 1e-5 or found.share_of_pixels_that_differ > 1e-4)


def measure(problem: VideoProblem, turns: int) -> Measured:
    """Let both sides take turns on the same video."""
    head, (queries, maps) = problem.head(), problem.features()
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(turns):
        dense = _timed(lambda: dense_tracks(head, queries, maps, problem.image_hw, problem.top_k), seconds["plain"])
        ours = _timed(lambda: our_tracks(problem, head, queries, maps), seconds["ours"])
    return replace(_compared(dense, ours, problem.image_hw), plain=seconds["plain"], ours=seconds["ours"])


def our_tracks(problem: VideoProblem, head: VitaHead, queries: Tensor, maps: Tensor) -> VideoTracks:
    """What `evaluate` does with a video, but for reading it."""
    return predict_video(
        head,
        map(TokenBlock.whole_frames, torch.split(queries, problem.block)),
        torch.split(maps, problem.block),
        num_frames=len(queries),
        decoding=MapDecoding(),
        image_hw=problem.image_hw,
        original_hw=problem.image_hw,
        top_k=problem.top_k,
    )


def _timed(work: Callable[[], Found], seconds: list[float]) -> Found:
    started = time.process_time()
    found = work()
    seconds.append(time.process_time() - started)
    return found


def _compared(dense: DenseTracks, ours: VideoTracks, hw: tuple[int, int]) -> Measured:
    rows = [dense.pairs.index(pair) for pair in zip(ours.query_index, ours.labels, strict=True)]
    scores = [abs(dense.scores[row] - score) for row, score in zip(rows, ours.scores, strict=True)]
    empty, different = np.zeros(hw, np.uint8), 0
    for row, track in zip(rows, ours.masks, strict=True):
        for rle, mask_hw in zip(track, dense.masks_NThw[row].numpy(), strict=True):
            different += int(((empty if rle is None else masks.mask(rle)) != mask_hw).sum())
    return Measured(
        plain=[],
        ours=[],
        largest_score_difference=max(scores),
        share_of_pixels_that_differ=different / dense.masks_NThw.numel(),
    )
