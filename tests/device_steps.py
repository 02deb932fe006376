"""A training step on one device and on another, for tests."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from configs.schema import Precision, Settings
from train_head.bench.problem import FixedPoints
from train_head.data.clips import Clip
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.run_folder import open_run
from train_head.step import StepLosses
from train_head.trainer import Trainer


def open_trainer(stored: Settings, device: str, precision: Precision = Precision.float32) -> Trainer[Clip]:
    settings = deepcopy(stored)
    settings.train.precision, settings.name = precision, f"{device}-{precision.value}-{stored.train.iterations}"
    source = CachedSource(settings, open_training_set(settings), torch.device(device))
    return Trainer(settings, source, open_run(settings, source.holdout), device=torch.device(device))


@dataclass(frozen=True)
class Gradients:
    """Loss terms and gradients of the first step, from the same points everywhere."""

    terms: dict[str, float]
    of_parameters: dict[str, Tensor]

    @classmethod
    def of(cls, trainer: Trainer[Clip]) -> Gradients:
        points_P2 = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)).to(trainer.device)
        trainer.compute.point_sources = lambda clips: [FixedPoints(points_P2) for _ in clips]  # type: ignore[method-assign]
        terms = trainer.compute.gradients(trainer.head, next(trainer._batches()))
        losses = StepLosses.read(terms, torch.zeros((), device=trainer.device))
        named = trainer.head.named_parameters()
        gradients = {name: parameter.grad.cpu() for name, parameter in named if parameter.grad is not None}
        return cls(vars(losses), gradients)


def assert_same_gradients(expected: Gradients, got: Gradients) -> None:
    """Up to rounding."""
    assert got.terms == pytest.approx(expected.terms, rel=1e-4)
    assert got.of_parameters.keys() == expected.of_parameters.keys()
    largest = max(float(gradient.norm()) for gradient in expected.of_parameters.values())
    for name, gradient in expected.of_parameters.items():
        difference = float((got.of_parameters[name] - gradient).norm())
        assert difference <= 1e-3 * float(gradient.norm()) + 1e-5 * largest, name  # some are nothing but rounding


def step_without_waiting(trainer: Trainer[Clip]) -> Tensor:
    """Loss terms of a step on CUDA. Raises where the host waits, but for the matching's costs, which come by event."""
    batches = trainer._batches()
    trainer.training_step(next(batches))  # compiles, and matches frames that are new
    clips = next(batches)
    targets = [trainer.source.targets(clip) for clip in clips]
    normalisers = trainer.compute.normalisers(targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return trainer.compute._backward(trainer.head, clips, targets, normalisers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
