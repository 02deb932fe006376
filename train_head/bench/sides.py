"""The sides of `python -m train_head bench`, each a process of its own that takes a step when told to.

All take the same step: clips of the same cache, the same head, the same optimiser, ending in updated weights.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train_head.bench.dense import PlainPoints, dense_losses
from train_head.bench.problem import FixedPoints, Problem
from train_head.bench.sustained import SustainedSteps, sustain
from train_head.data.clips import Clip
from train_head.data.sources import CachedSource, ClipFeatures
from train_head.data.video_sets import open_training_set
from train_head.losses.criterion import LossNormalisers
from train_head.losses.matcher import match_clips
from train_head.losses.points import PointSource
from train_head.products import product
from train_head.trainer import Trainer


class SideName(Enum):
    """What is compared."""

    live = "live"  # the detector runs in every step
    dense = "dense"  # cached features, the published losses done the plain way
    ours = "ours"
    cheap = "cheap"  # ours with every option that changes the losses
    bfloat16 = "bfloat16"  # cheap, on a CPU in bfloat16 too: on CUDA every side is


@dataclass(frozen=True, kw_only=True)
class SideReport:
    """What a side found out about itself beside its speed."""

    peak_bytes: int  # of a step, above what is held between steps
    parts: dict[str, float]  # seconds, of `ours` only
    pace: SustainedSteps | None  # of `ours` only
    flops: float  # multiplications and additions of one step's matrix products, of `ours` only
    flops_per_second: float  # of one large product, now
    losses: dict[str, tuple[float, float]]  # dense and ours, from the same points, of `dense` only


class Stopwatch:
    """Seconds: of this process's processor time on CPU, which others on the machine hardly touch; real on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter() if self.device.type == "cuda" else time.process_time()
        seconds, self.started = now - self.started, now
        return seconds


class Memory:
    """Peak above what is held between two steps: of the device's allocator, or of the process (Linux, VmHWM)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.idle = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.idle = _status("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        held = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status("VmHWM")
        return held - self.idle


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Side(Protocol):
    """Something that trains."""

    def step(self) -> None:
        """Read a batch and train on it."""


class Ours:
    """The trainer as it is."""

    def __init__(self, problem: Problem, folder: Path, options: Sequence[str] = ()) -> None:
        settings = problem.settings(folder, options)
        self.problem, self.videos = problem, open_training_set(settings)
        source = CachedSource(settings, self.videos, torch.device(problem.device))
        self.trainer = Trainer(settings, source, folder / "none")
        self.batches: Iterator[list[Clip]] = self.trainer._batches()

    def step(self) -> None:
        """Read a batch and train on it."""
        self.trainer.training_step(next(self.batches))

    def parts(self) -> dict[str, float]:
        """One step in pieces; the matching is done once more to be timed alone."""
        trainer, compute = self.trainer, self.trainer.compute
        watch = Stopwatch(trainer.device)
        clips = next(self.batches)
        seconds = {"data": watch.lap()}
        features, normalisers = self.inputs(clips)
        maps, targets = features.maps, features.targets
        seconds["targets"] = watch.lap()
        trainer.optimizer.zero_grad(set_to_none=True)
        outputs, weights = compute.forward(trainer.head, features)
        seconds["head forward"] = watch.lap()
        match_clips(
            outputs.class_logits_DLBVK,
            weights,
            maps,
            targets,
            compute.point_sources(clips),
            cost_weights=compute.criterion.cost_weights,
            padded_area=compute.criterion.padded_area,
        )
        seconds["matching"] = watch.lap()
        losses = compute.criterion(outputs, weights, maps, targets, compute.point_sources(clips), normalisers)
        seconds["sampled losses"] = watch.lap() - seconds["matching"]
        losses.total.backward()  # type: ignore[no-untyped-call]
        seconds["backward"] = watch.lap()
        nn.utils.clip_grad_norm_(trainer.head.parameters(), trainer.settings.train.clip_norm)
        trainer.optimizer.step()
        seconds["optimiser"] = watch.lap()
        return seconds

    def inputs(self, clips: Sequence[Clip]) -> tuple[ClipFeatures, LossNormalisers]:
        """Features and labels of a batch, and what its losses are divided by."""
        compute = self.trainer.compute
        targets = [compute.source.targets(clip) for clip in clips]
        normalisers = compute.normalisers(targets)
        return compute.source.features(clips, targets, normalisers.frames), normalisers.clips

    def flops(self) -> float:
        """Multiplications and additions of the matrix products of one step."""
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear_flops})
        with counter:
            self.step()
        return float(counter.get_total_flops())


def _linear_flops(rows: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(rows) * weight[0]


class Live(Ours):
    """The same step with features that the detector makes in every step."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        super().__init__(problem, folder)
        from transformers import Mask2FormerForUniversalSegmentation

        from extract.detector.architectures import official_config  # noqa: TID251  # the benchmark is where the stages meet
        from extract.detector.frozen import TransformersDetector  # noqa: TID251

        config = official_config("r50")
        config.hidden_dim = config.feature_size = config.mask_feature_size = problem.channels
        config.num_queries = problem.queries
        self.detector = TransformersDetector(
            Mask2FormerForUniversalSegmentation(config),
            num_layers=problem.layers,
            precision="bfloat16" if problem.device == "cuda" else "float32",
            device=problem.device,
        )
        self.images = torch.randint(0, 256, (problem.frames, 3, *problem.image_hw), dtype=torch.uint8)

    def step(self) -> None:
        """Run the detector on as many frames as a batch has, then train on what it says."""
        self.trainer.training_step([self._live(clip) for clip in next(self.batches)])

    def _live(self, clip: Clip) -> Clip:
        frames = [self.images] if self.problem.device == "cuda" else torch.split(self.images, 1)  # the faster way there
        found = [self.detector.features(frame) for frame in frames]
        queries = torch.cat([each.frame_queries_BLQC for each in found])
        maps = torch.cat([each.mask_features_BCHW for each in found])
        H, W = clip.map_TRHW.shape[2:]
        return replace(clip, frame_queries_TLQC=queries, map_TRHW=maps[..., :H, :W])


class Dense(Ours):
    """Cached features, our head, the published losses done the plain way."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        super().__init__(problem, folder)
        self.generator = torch.Generator(self.trainer.device).manual_seed(0)

    def step(self) -> None:
        """Read a batch and train on it."""
        trainer, compute, clips = self.trainer, self.trainer.compute, next(self.batches)
        trainer.optimizer.zero_grad(set_to_none=True)
        features, normalisers = self.inputs(clips)
        outputs = compute.forward(trainer.head, features)[0]
        points: list[PointSource] = [PlainPoints(compute.points, self.generator) for _ in clips]
        with torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=compute.autocast):
            losses = dense_losses(trainer.head, outputs, features.maps, features.targets, points, normalisers)
        losses.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainer.head.parameters(), trainer.settings.train.clip_norm)
        trainer.optimizer.step()

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # (b) alone has a convolution, of 10 bits by default
    def compare(self) -> dict[str, tuple[float, float]]:
        """Loss terms of both implementations from the same points, in float32: (dense, ours)."""
        trainer, compute, clips = self.trainer, self.trainer.compute, next(self.batches)
        compute.autocast = False
        generator = torch.Generator().manual_seed(1)
        points_P2 = torch.rand(self.problem.points, 2, generator=generator).to(trainer.device)
        points: list[PointSource] = [FixedPoints(points_P2) for _ in clips]
        features, normalisers = self.inputs(clips)
        maps, targets = features.maps, features.targets
        outputs, weights = compute.forward(trainer.head, features)
        dense = dense_losses(trainer.head, outputs, maps, targets, points, normalisers)
        ours = compute.criterion(outputs, weights, maps, targets, points, normalisers)
        pairs = {
            "class": (dense.label, ours.class_D.sum()),
            "mask": (dense.mask, ours.mask_D.sum()),
            "dice": (dense.dice, ours.dice_D.sum()),
            "similarity": (dense.similarity, ours.similarity),
            "total": (dense.total, ours.total),
        }
        return {name: (float(plain), float(fast)) for name, (plain, fast) in pairs.items()}


def build(name: SideName, problem: Problem, folder: Path) -> Ours:
    """Build one side; it reads the cache in `folder`."""
    if name is SideName.live:
        return Live(problem, folder)
    if name is SideName.dense:
        return Dense(problem, folder)
    options = {SideName.cheap: [], SideName.bfloat16: ["train.precision=bfloat16"]}
    return Ours(problem, folder, [*problem.cheap_options(), *options[name]] if name in options else ())


def serve(name: SideName, problem: Problem, folder: Path, parent: Connection) -> None:
    """Take a step and send its seconds for every True received; on False send the report and end."""
    torch.set_num_threads(1)
    side = build(name, problem, folder)
    device = side.trainer.device
    losses = side.compare() if isinstance(side, Dense) else {}  # before training makes queries alike, and matches ties
    side.step()  # fills the frame memory and the optimiser's state, loads libraries
    side.trainer.optimizer.zero_grad(set_to_none=True)
    memory = Memory(device)
    parent.send(0.0)
    watch = Stopwatch(device)
    while parent.recv():
        watch.lap()
        side.step()
        parent.send(watch.lap())
    peak_bytes = memory.peak()
    parent.send(
        SideReport(
            peak_bytes=peak_bytes,
            parts=_median_parts(side) if name is SideName.ours else {},
            pace=sustain(side.trainer, side.batches) if name is SideName.ours else None,
            flops=side.flops() if name is SideName.ours else 0.0,
            flops_per_second=product_rate(device),
            losses=losses,
        )
    )


def _median_parts(side: Ours) -> dict[str, float]:
    runs = [side.parts() for _ in range(5)]
    return {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}


def product_rate(device: torch.device) -> float:
    """Operations a second of the head's largest kind of product, in the step's precision; the best of many."""
    number_type, rows = (torch.bfloat16, 1 << 14) if device.type == "cuda" else (torch.float32, 1500)
    tokens, weight = torch.randn(rows, 256, device=device), torch.randn(2048, 256, device=device)
    tokens, weight = tokens.to(number_type), weight.to(number_type)
    watch, best, at_once = Stopwatch(device), math.inf, 50 if device.type == "cuda" else 1  # hides the launches
    for _ in range(30):
        watch.lap()
        for _ in range(at_once):
            product(tokens, weight)
        best = min(best, watch.lap() / at_once)
    return 2 * rows * 256 * 2048 / best
