"""`python -m extract balance`: what many workers would do, by simulation, before anybody pays for them.

Lengths are drawn, not read: log-normal about the mean and cut at the longest video of a data set. Of YouTube-VIS 2019
the mean is known (61,845 frames of 2,238 train videos), of OVIS the longest video (500 frames); all other
figures in LENGTHS are assumptions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.layout import FRAMES_PER_SHARD
from configs.schema import BATCH_FRAMES

LENGTHS = {"ytvis2019": (27.6, 0.3, 36), "ytvis2021": (30.0, 0.4, 84), "ovis": (69.0, 0.6, 500)}
"""Mean of the frames, spread (of their logarithm), longest video."""
METADATA_FILES = 3
"""Of a video: its group and two arrays."""
BYTES_PER_FRAME = 7_500_000
"""A frame of 360x640 with its queries (README.md, How large?); other codecs need less: `python -m extract estimate`."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A simulated extraction: seconds from the first video to the last, and the share of them that workers idle."""

    seconds: float
    idle: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Assumed speed and prices."""

    frames_per_second: float  # of a GPU
    seconds_per_video: float  # beside its frames: opening, committing
    dollars_per_gpu_hour: float
    dollars_per_terabyte_month: float


def draw_lengths(name: str, num_videos: int, rng: np.random.Generator) -> list[int]:
    """Frames of the videos of a set like `name`."""
    mean, spread, longest = LENGTHS[name]
    lengths = rng.lognormal(np.log(mean) - spread**2 / 2, spread, num_videos)
    return [int(length) for length in np.clip(np.rint(lengths), 1, longest)]


def simulate(lengths: Sequence[int], num_workers: int, rates: Rates) -> Schedule:
    """Hand out videos in the order given, each to the worker that is free first; batches are filled up, as ever."""
    free, work = [0.0] * num_workers, 0.0
    for length in lengths:
        batches = -(-length // BATCH_FRAMES)
        seconds = batches * BATCH_FRAMES / rates.frames_per_second + rates.seconds_per_video
        work += seconds
        heapq.heappush(free, heapq.heappop(free) + seconds)
    end = max(free)
    return Schedule(seconds=end, idle=1 - work / (num_workers * end))


def print_balance(num_workers: int, num_videos: int, rates: Rates) -> None:
    """Print idle time in either order, then hours, bytes, files and costs."""
    rng = np.random.default_rng(0)
    print(f"{num_workers} workers, {num_videos} videos, {rates.frames_per_second:g} frames/s a worker (assumed)")
    print(f"{'lengths like':<12}{'frames':>12}{'longest first':>15}{'file order':>12}{'hours':>8}{'GPU $':>9}", end="")
    print(f"{'TB float16':>12}{'files':>12}{'$ a month':>11}")
    for name in LENGTHS:
        lengths = draw_lengths(name, num_videos, rng)
        frames = sum(lengths)
        best, plain = (simulate(order, num_workers, rates) for order in (sorted(lengths, reverse=True), lengths))
        hours, terabytes = best.seconds / 3600, frames * BYTES_PER_FRAME / 1e12
        files = sum(METADATA_FILES + 2 * -(-length // FRAMES_PER_SHARD) for length in lengths)
        print(f"{name:<12}{frames:>12,}{best.idle:>14.2%} {plain.idle:>11.2%}{hours:>8.2f}", end="")
        print(f"{hours * num_workers * rates.dollars_per_gpu_hour:>9,.0f}{terabytes:>12,.2f}{files:>12,}", end="")
        print(f"{terabytes * rates.dollars_per_terabyte_month:>11,.0f}")
