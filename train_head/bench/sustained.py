"""How a run of our side goes: steps one after the other, their wait for data, and what takes the time in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from train_head.data.clips import Clip
from train_head.trainer import Trainer

_PREFETCHED = 16  # batches that loaders may have read while other sides took their turn; they hide the reading


@dataclass(frozen=True, kw_only=True)
class SustainedSteps:
    """Consecutive steps, in real seconds, with nothing else to do in between."""

    seconds: float  # of one step
    waiting: float  # share of it that the trainer waited for a batch
    largest: str  # table of the operations that took longest


def sustain(trainer: Trainer[Clip], batches: Iterator[list[Clip]]) -> SustainedSteps:
    """Take many steps on CUDA, a few on CPU, then one more under the profiler."""
    on_cuda = trainer.device.type == "cuda"
    for _ in range(_PREFETCHED if on_cuda else 0):
        trainer.training_step(next(batches))
    steps, waited, started = 40 if on_cuda else 2, 0.0, _now(trainer.device)
    for _ in range(steps):
        asked = time.perf_counter()
        clips = next(batches)
        waited += time.perf_counter() - asked
        trainer.training_step(clips)
    seconds = _now(trainer.device) - started
    return SustainedSteps(seconds=seconds / steps, waiting=waited / seconds, largest=_largest(trainer, next(batches)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _largest(trainer: Trainer[Clip], clips: list[Clip]) -> str:
    on_cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        trainer.training_step(clips)
        _now(trainer.device)
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)
    return table
