"""`python -m train_head bench`: what a training step costs, against the live detector and against plain losses.

Every side is a process with one thread; they take turns, so that whatever else the machine does hits all alike, and the
medians count. A turn lasts some seconds, of one slow step or many fast ones: as in training, a step then finds the
processor's caches as the step before has left them. One run needs no data and no weights: features are random, of
real size.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cache.bench.reading import machine
from configs.command import device_name
from configs.schema import Device
from train_head.bench.problem import ITERATIONS, Problem, in_miniature, write_bench_cache
from train_head.bench.sides import HALF, SideName, SideReport, serve
from train_head.bench.sustained import SustainedSteps
from train_head.products import has_bfloat16

_TURN_SECONDS = {"cpu": 4.0, "cuda": 1.0}
_DETECTOR_MODULE = "extract.detector.frozen"  # which the live side imports


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All sides at one problem: seconds of every step, and what each side found."""

    problem: Problem
    seconds: dict[str, list[float]]
    reports: dict[str, SideReport]

    def median(self, side: SideName) -> float:
        """Seconds of a typical step."""
        return statistics.median(self.seconds[side.value])

    def floor(self) -> float:
        """Seconds that the matrix products of our step take at the measured rate."""
        return self.reports["ours"].flops / self.reports["ours"].flops_per_second

    def largest_difference(self) -> float:
        """Largest relative difference of a loss term between the dense side and ours, at the same points."""
        pairs = self.reports["dense"].losses.values()
        return max(abs(dense - ours) / max(abs(dense), 1e-12) for dense, ours in pairs)


def bench(output: Path | None, device: Device, *, quick: bool, small: bool) -> int:
    """Measure, print the tables, and write JSON to `output`; status 1 where the losses differ by more than 1e-4.

    `quick`: fewer steps of one problem; `small`: and that in miniature.
    """
    name = device_name(device)
    base = Problem(device=name, clips=8 if name == "cuda" else 1, frames=6 if name == "cuda" else 5)
    problems = [in_miniature(base)] if small else [base] if quick else [base, replace(base, enc_layers=3, dec_layers=6)]
    turns = 1 if small else 3 if quick else 7
    facts = {**machine(), "torch": version("torch"), "device": _device_words(name)}
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    if not has_bfloat16(torch.device(name)):
        print("this processor has no bfloat16: the sides in it are left out")
    found: list[Comparison] = []
    for problem in problems:  # what is known so far is told at once: a machine may be lent for minutes only
        found.append(compare(problem, turns))
        print(table(found[-1]), flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({"machine": facts, "steps": [asdict(one) for one in found]}, indent=2))
    if output is not None:
        print(f"written: {output}")
    return int(max(comparison.largest_difference() for comparison in found) > 1e-4)


def _device_words(name: str) -> str:
    return torch.cuda.get_device_name() if name == "cuda" else "CPU, 1 thread, processor time"


def compare(problem: Problem, turns: int) -> Comparison:
    """Let all sides take their steps in turns."""
    context = get_context("forkserver")  # the sides' imports, which take seconds, happen once
    context.set_forkserver_preload([serve.__module__, _DETECTOR_MODULE])
    with tempfile.TemporaryDirectory(prefix="vita-head-bench-") as folder:
        write_bench_cache(Path(folder), problem)
        ends, processes = {}, []
        for name in SideName:
            if name in HALF and not (problem.device == "cpu" and has_bfloat16(torch.device("cpu"))):
                continue
            ends[name], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(name, problem, Path(folder), theirs)))
            processes[-1].start()
            theirs.close()
        for name, end in ends.items():
            _answer(name, end)
        seconds: dict[str, list[float]] = {name.value: [] for name in ends}
        for _ in range(turns):
            for name, end in ends.items():
                past = seconds[name.value]
                end.send(max(1, round(_TURN_SECONDS[problem.device] / past[-1])) if past else 1)
                past.append(_answer(name, end))
        reports = {}
        for name, end in ends.items():
            end.send(0)
            reports[name.value] = _answer(name, end)
        for process in processes:
            process.join()
    return Comparison(problem=problem, seconds=seconds, reports=reports)


def _answer(name: SideName, end: Connection) -> Any:
    """What a side sends. Raises RuntimeError where its process has died."""
    try:
        return end.recv()
    except EOFError:
        raise RuntimeError(f"the side {name.value!r} of the benchmark has died; its own output says why") from None


_WORDS = {
    SideName.live: "(a) live detector + our losses",
    SideName.dense: "(b) plain losses on cached features",
    SideName.ours: "(c) ours",
    SideName.dense_half: "(b) in bfloat16",
    SideName.half: "(c) in bfloat16",
    SideName.cheap: "(d) ours, cheap options",
    SideName.cheap_half: "(e) the same in bfloat16",
}


def table(found: Comparison) -> str:
    """Seconds, ratios ((b) in the precision of the row), memory; the parts of our step; the floor."""
    size, ours = found.problem, found.reports["ours"]
    head = f"{size.enc_layers} + {size.dec_layers} layers, {size.clips} x {size.frames} frames, {size.points} points"
    lines = [f"\n{head:38}{'seconds':>9}{'(a)/x':>8}{'(b)/x':>8}{'peak MB':>10}{'(b)/x':>8}"]
    live = found.median(SideName.live)
    for name, words in _WORDS.items():
        if name.value not in found.seconds:
            continue
        plain = SideName.dense_half if name in HALF else SideName.dense  # of the same precision
        seconds, dense = found.median(name), found.median(plain)
        peak = found.reports[name.value].peak_bytes
        memory = found.reports[plain.value].peak_bytes / max(1, peak)
        lines.append(
            f"{words:38}{seconds:9.3f}{live / seconds:8.1f}{dense / seconds:8.1f}{peak / 1e6:10.0f}{memory:8.1f}"
        )
    parts = "  ".join(f"{name} {seconds:.3f}" for name, seconds in ours.parts.items())
    step, floor = found.median(SideName.ours), found.floor()
    lines += [
        f"parts of (c): {parts}",
        f"floor of (c): {ours.flops / 1e9:.0f} GFLOP of products at {ours.flops_per_second / 1e9:.0f} GFLOP/s are "
        f"{floor:.3f} s; the step takes {step / floor:.1f} times that",
        f"equal points: the loss terms of (b) and (c) differ by at most {found.largest_difference():.1e}",
        *(_pace_line(_WORDS[name], found.reports[name.value]) for name in (SideName.ours, SideName.cheap)),
        _pace(ours).largest,
    ]
    return "\n".join(lines)


def _pace(report: SideReport) -> SustainedSteps:
    assert report.pace is not None
    return report.pace


def _pace_line(words: str, report: SideReport) -> str:
    pace = _pace(report)
    return (
        f"{words}, steps one after the other: {pace.seconds:.3f} s each, {1 / pace.seconds:.2f} a second, "
        f"{pace.seconds * ITERATIONS / 3600:.1f} hours for {ITERATIONS}; {pace.waiting:.1%} of that waits for data"
    )
