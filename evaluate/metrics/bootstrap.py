"""Is a difference real? The paired bootstrap over videos (Efron and Tibshirani 1993, chapter 13).

A resample draws as many videos as the split has, with replacement, and scores every run on that same draw; several
seeds of one kind are averaged draw by draw. What is left to vary between draws is what the choice of videos does
to the difference. Shapes: S resamples, V videos.
"""

from __future__ import annotations

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
    def of(cls, values_S: FloatArray) -> Interval:
        """The first value, which is the split's, and the percentile interval of the others that are defined."""
        samples = _defined(values_S[1:])
        if np.isnan(values_S[0]) or not samples.size:
            return cls(value=None, low=None, high=None)
        low, high = np.percentile(samples, [_TAIL, 100 - _TAIL]).tolist()
        return cls(value=float(values_S[0]), low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference to the reference, with its interval and two-sided p."""

    interval: Interval
    p: float | None


def draw_weights(num_videos: int, resamples: int, seed: int = 0) -> FloatArray:
    """How often each video is drawn in each resample, (S, V), the rows adding up to V."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_videos, np.full(num_videos, 1 / num_videos), size=resamples)
    return counts.astype(np.float64)


def split_and_draws(num_videos: int, resamples: int = RESAMPLES) -> FloatArray:
    """Weights of the split as it is, then of its resamples, (1 + resamples, V)."""
    return np.vstack([np.ones((1, num_videos)), draw_weights(num_videos, resamples)])


def paired_difference(values_S: FloatArray, reference_S: FloatArray) -> Difference:
    """Compare two numbers under the weights of `split_and_draws`."""
    differences_S = values_S - reference_S
    return Difference(interval=Interval.of(differences_S), p=_two_sided_p(differences_S[1:]))


def _defined(values_S: FloatArray) -> FloatArray:
    return values_S[~np.isnan(values_S)]


def _two_sided_p(differences_S: FloatArray) -> float | None:
    """Twice the share of draws on the rarer side of zero; never 0, for the data themselves count as one draw."""
    drawn = _defined(differences_S)
    if not drawn.size:
        return None
    rarer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (drawn.size + 1))
