"""Where a run's time goes: into steps, or into waiting for the data of the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WINDOW = 50
"""Steps that are judged together; the very first one starts the workers and does not count."""
SLOW_SHARE = 0.2
"""Of a window's time, from which on a run is said to wait for data."""


@dataclass(kw_only=True)
class _Times:
    """Seconds spent in `steps` steps."""

    data: float = 0.0
    step: float = 0.0
    steps: int = 0


class Pace:
    """The clock of one session of a run, and how its steps split into `data_time` and `step_time`."""

    def __init__(self, before: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """`before`: seconds of the run's earlier sessions. `clock`: seconds since any moment."""
        self._before, self._clock, self._started = before, clock, clock()
        self._logged, self._judged = _Times(), _Times(steps=-1)
        self._warned = False

    @property
    def seconds(self) -> float:
        """Of the run, over all sessions."""
        return self._before + self._clock() - self._started

    def spent(self, budget: float) -> bool:
        """Whether a time budget in seconds, where there is one, is used up."""
        return 0 < budget <= self.seconds

    def step(self, batches: Iterator[T], compute: Callable[[T], R]) -> R:
        """Wait for the next batch, then compute with it, and note how long each of them took."""
        asked = self._clock()
        batch = next(batches)
        arrived = self._clock()
        result = compute(batch)
        self._note(data=arrived - asked, step=self._clock() - arrived)
        return result

    def _note(self, *, data: float, step: float) -> None:
        for times in (self._logged, self._judged):
            times.data, times.step, times.steps = times.data + data, times.step + step, times.steps + 1
        if self._judged.steps == 0:
            self._judged = _Times()

    def times(self) -> dict[str, float]:
        """Seconds of the run, and the mean seconds a step since the last call: what a line of the log holds."""
        logged, self._logged = self._logged, _Times()
        steps = max(logged.steps, 1)
        return {"seconds": self.seconds, "data_time": logged.data / steps, "step_time": logged.step / steps}

    def complaint(self) -> str | None:
        """Once a run: that a window of WINDOW steps waited for data, and what to do about it."""
        judged = self._judged
        if self._warned or judged.steps < WINDOW:
            return None
        self._judged = _Times()
        share = judged.data / max(judged.data + judged.step, 1e-9)
        if share <= SLOW_SHARE:
            return None
        self._warned = True
        return (
            f"train: the last {WINDOW} steps waited for data {share:.0%} of their time: reading features takes longer "
            f"than a step ({1e3 * judged.data / WINDOW:.0f} ms of waiting, {1e3 * judged.step / WINDOW:.0f} ms of "
            "computing). Raise train.workers where cores are idle, set cache.preload=true where the set fits into "
            "memory, or bring the cache to a local disk (cache.stage_to)"
        )
