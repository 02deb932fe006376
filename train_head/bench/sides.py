"""The sides of `python -m train_head bench`, each a process of its own that takes a step when told to.

All take the same step: clips of the same cache, the same head, the same optimiser, ending in updated weights.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cache.allocation import keep_freed_memory
from train_head.bench.dense import PlainPoints, dense_losses
from train_head.bench.measuring import Memory, Stopwatch, product_rate
from train_head.bench.problem import FixedPoints, Problem
from train_head.bench.sustained import SustainedSteps, sustain
from train_head.data.clips import Clip
from train_head.data.sources import CachedSource, ClipFeatures
from train_head.data.video_sets import open_training_set
from train_head.losses.criterion import LossNormalisers
from train_head.losses.points import PointSource
from train_head.trainer import Trainer


class SideName(Enum):
    """What is compared."""

    live = "live"  # the detector runs in every step
    dense = "dense"  # cached features, the published losses done the plain way
    ours = "ours"
    dense_half = "dense_half"  # plain losses in bfloat16
    half = "half"  # ours in bfloat16, the losses unchanged: the release trains in half precision
    cheap = "cheap"  # ours with every option that changes the losses
    cheap_half = "cheap_half"  # cheap, in bfloat16 too


HALF = (SideName.dense_half, SideName.half, SideName.cheap_half)  # on a CPU; on CUDA every side is in bfloat16


@dataclass(frozen=True, kw_only=True)
class SideReport:
    """What a side found out about itself beside its speed."""

    peak_bytes: int  # of a step, above what is held between steps
    parts: dict[str, float]  # seconds, of `ours` only
    pace: SustainedSteps | None  # of `ours` and `cheap` only
    flops: float  # multiplications and additions of one step's matrix products, of `ours` only
    flops_per_second: float  # of one large product, now, in the process of `ours` only
    losses: dict[str, tuple[float, float]]  # dense and ours, from the same points, of `dense` only


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
        compute.criterion.match(outputs, weights, maps, targets, compute.point_sources(clips))
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

        if problem.device == "cpu":
            keep_freed_memory(however_large=True)  # as extraction does
        config = official_config("r50")
        config.hidden_dim = config.feature_size = config.mask_feature_size = problem.channels
        config.num_queries = problem.queries
        self.detector = TransformersDetector(
            Mask2FormerForUniversalSegmentation(config),
            num_layers=problem.layers,
            precision="bfloat16" if problem.device == "cuda" else "float32",
            device=problem.device,
        )
        self.images = torch.randint(0, 256, (problem.clips * problem.frames, 3, *problem.image_hw), dtype=torch.uint8)

    def step(self) -> None:
        """Run the detector on as many frames as a batch has, then train on what it says."""
        at_once = len(self.images) if self.problem.device == "cuda" else 1  # the faster way on CPU
        found = [self.detector.features(frames) for frames in torch.split(self.images, at_once)]
        queries = torch.split(torch.cat([each.frame_queries_BLQC for each in found]), self.problem.frames)
        maps = torch.split(torch.cat([each.mask_features_BCHW for each in found]), self.problem.frames)
        clips = []
        for clip, queries_TLQC, map_TCHW in zip(next(self.batches), queries, maps, strict=True):
            H, W = clip.map_TRHW.shape[2:]
            clips.append(replace(clip, frame_queries_TLQC=queries_TLQC, map_TRHW=map_TCHW[..., :H, :W]))
        self.trainer.training_step(clips)


class Dense(Ours):
    """Cached features, our head, the published losses done the plain way."""

    def __init__(self, problem: Problem, folder: Path, options: Sequence[str] = ()) -> None:
        super().__init__(problem, folder, options)
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
        autocast, compute.autocast = compute.autocast, False
        generator = torch.Generator().manual_seed(1)
        points_P2 = torch.rand(self.problem.points, 2, generator=generator).to(trainer.device)
        points: list[PointSource] = [FixedPoints(points_P2) for _ in clips]
        features, normalisers = self.inputs(clips)
        maps, targets = features.maps, features.targets
        outputs, weights = compute.forward(trainer.head, features)
        dense = dense_losses(trainer.head, outputs, maps, targets, points, normalisers)
        exact = replace(compute.criterion, matching_type=torch.float32)
        ours = exact(outputs, weights, maps, targets, points, normalisers)
        compute.autocast = autocast
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
    half = ["train.precision=bfloat16"] if name in HALF else []
    if name in (SideName.dense, SideName.dense_half):
        return Dense(problem, folder, half)
    cheap = problem.cheap_options() if name in (SideName.cheap, SideName.cheap_half) else []
    return Ours(problem, folder, [*cheap, *half])


def serve(name: SideName, problem: Problem, folder: Path, parent: Connection) -> None:
    """Take as many steps as is received and send the seconds of one; on 0 send the report and end."""
    try:
        _serve(name, problem, folder, parent)
    except EOFError:  # another side has failed, and its process says why
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        cause: BaseException | None = error
        while cause is not None:  # what the frames hold ends with them, loaders and their workers too
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        sys.exit(1)


def _serve(name: SideName, problem: Problem, folder: Path, parent: Connection) -> None:
    torch.set_num_threads(1)
    side = build(name, problem, folder)
    device = side.trainer.device
    losses = side.compare() if isinstance(side, Dense) else {}  # before training makes queries alike, and matches ties
    side.step()  # fills the frame memory and the optimiser's state, loads libraries
    side.trainer.optimizer.zero_grad(set_to_none=True)
    memory = Memory(device)
    parent.send(0.0)
    watch = Stopwatch(device)
    while steps := parent.recv():
        watch.lap()
        for _ in range(steps):
            side.step()
        parent.send(watch.lap() / steps)
    peak_bytes = memory.peak()
    parent.send(
        SideReport(
            peak_bytes=peak_bytes,
            parts=_median_parts(side) if name is SideName.ours else {},
            pace=sustain(side.trainer, side.batches) if name in (SideName.ours, SideName.cheap) else None,
            flops=side.flops() if name is SideName.ours else 0.0,
            flops_per_second=product_rate(device) if name is SideName.ours else 0.0,
            losses=losses,
        )
    )


def _median_parts(side: Ours) -> dict[str, float]:
    runs = [side.parts() for _ in range(5)]
    return {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}
