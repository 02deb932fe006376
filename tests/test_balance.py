"""The simulated schedule of many workers."""

from __future__ import annotations

import numpy as np
import pytest

from extract.workers.balance import LENGTHS, Rates, draw_lengths, simulate

RATES = Rates(frames_per_second=8, seconds_per_video=0, dollars_per_gpu_hour=0, dollars_per_terabyte_month=0)


def test_schedules_worked_by_hand() -> None:
    # Batches of 8 at 8 frames/s: seconds are 1, 1, 2 (9 frames fill two batches), 4.
    late = simulate([8, 8, 9, 32], 2, RATES)  # 1+2 and 1+4
    assert (late.seconds, late.idle) == (5, pytest.approx(1 - 8 / 10))
    first = simulate([32, 9, 8, 8], 2, RATES)  # 4 and 2+1+1
    assert (first.seconds, first.idle) == (4, 0)


@pytest.mark.parametrize("name", LENGTHS)
def test_64_workers_idle_less_than_a_twentieth_on_10_000_videos(name: str) -> None:
    lengths = draw_lengths(name, 10_000, np.random.default_rng(1))
    mean, _, longest = LENGTHS[name]
    assert min(lengths) >= 1 and max(lengths) <= longest
    assert sum(lengths) / 10_000 == pytest.approx(mean, rel=0.1)
    assert simulate(sorted(lengths, reverse=True), 64, RATES).idle <= 0.05
