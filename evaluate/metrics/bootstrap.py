"""Is a difference real? The paired bootstrap over videos (Efron and Tibshirani 1993, chapter 13).

A resample draws as many videos as the split has, with replacement, and scores every run on that same draw; several
seeds of one kind are averaged draw by draw. What is left to vary between draws is what the choice of videos does
to the difference. Shapes: S resamples, V videos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evaluate.metrics.weighted import FloatArray

RESAMPLES = 1000
_TAIL = 2.5  # percent outside a 95 % interval, on each side


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with its 95 % bootstrap interval, in the unit of the number; None where nothing is to be found."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float, samples_S: FloatArray) -> Interval:
        """Percentile interval of the samples that are defined."""
        samples = samples_S[~np.isnan(samples_S)]
        if math.isnan(value) or not samples.size:
            return cls(value=None, low=None, high=None)
        low, high = np.percentile(samples, [_TAIL, 100 - _TAIL]).tolist()
        return cls(value=value, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference to the reference, with its interval and two-sided p."""

    interval: Interval
    p: float | None


def draw_weights(num_videos: int, resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """How often each video is drawn in each resample, (S, V), the rows adding up to V."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_videos, np.full(num_videos, 1 / num_videos), size=resamples)
    return counts.astype(np.float64)


def paired_difference(
    value: float, reference: float, samples_S: FloatArray, reference_samples_S: FloatArray
) -> Difference:
    """Compare two numbers whose samples come from the same draws."""
    interval = Interval.of(value - reference, samples_S - reference_samples_S)
    return Difference(interval=interval, p=_two_sided_p(samples_S - reference_samples_S))


def _two_sided_p(differences_S: FloatArray) -> float | None:
    """Twice the share of draws on the rarer side of zero; never 0, for the data themselves count as one draw."""
    drawn = differences_S[~np.isnan(differences_S)]
    if not drawn.size:
        return None
    rarer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (drawn.size + 1))
