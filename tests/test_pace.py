"""Where a run's time goes, by a clock that the test sets: waiting for batches is told from computing with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.schema import Settings
from train_head.pace import WINDOW, Pace
from train_head.run_folder import read_metrics_log


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def batches(self, seconds: list[float]) -> Iterator[int]:
        for number, pause in enumerate(seconds):
            self.now += pause
            yield number

    def compute(self, batch: int) -> int:
        self.now += 0.5
        return -batch


def run(pace: Pace, clock: Clock, seconds: list[float]) -> list[str]:
    """Steps that wait so long each; returns the complaints."""
    batches = clock.batches(seconds)
    complaints = []
    for _ in seconds:
        pace.step(batches, clock.compute)
        if (complaint := pace.complaint()) is not None:
            complaints.append(complaint)
    return complaints


def test_a_line_of_the_log_tells_waiting_from_computing() -> None:
    clock = Clock()
    pace = Pace(7.0, clock)
    assert run(pace, clock, [3.0, 0.0, 0.0]) == []
    assert pace.times() == pytest.approx({"seconds": 7 + 4.5, "data_time": 1.0, "step_time": 0.5})
    clock.now += 60  # an evaluation: neither waiting nor computing
    run(pace, clock, [0.25, 0.75])
    assert pace.times() == pytest.approx({"seconds": 7 + 4.5 + 60 + 2, "data_time": 0.5, "step_time": 0.5})
    assert pace.step(clock.batches([0.0] * 3), clock.compute) == 0
    assert pace.spent(74.0) and not pace.spent(1e6) and not pace.spent(0)


def test_a_run_that_waits_for_data_says_so_once() -> None:
    clock = Clock()
    pace = Pace(0.0, clock)
    (complaint,) = run(pace, clock, [0.0] + [0.25] * (3 * WINDOW))
    assert "waited for data 33% of their time" in complaint and "250 ms of waiting" in complaint
    assert all(name in complaint for name in ("train.workers", "cache.preload", "cache.stage_to"))


@pytest.mark.parametrize("waits", [[100.0] + [0.1] * WINDOW, [0.0] + [1.0] * (WINDOW - 1)])
def test_starting_workers_and_single_slow_steps_are_no_reason(waits: list[float]) -> None:
    """By hand: 0.1 s beside 0.5 s is 17 %; 49 steps are no window."""
    clock = Clock()
    assert run(Pace(0.0, clock), clock, waits) == []


def test_the_log_of_a_run_holds_both_times(tiny_run: Settings) -> None:
    for entry in read_metrics_log(Path(tiny_run.runs) / tiny_run.name):
        assert entry["data_time"] >= 0 and entry["step_time"] > 0
        assert entry["data_time"] + entry["step_time"] <= entry["seconds"]
