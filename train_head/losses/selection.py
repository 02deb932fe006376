"""The k smallest of many numbers, on CPU: the most uncertain points of a mask.

Shapes: G rows of S numbers, K chosen.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_SAMPLE = 1024
_DEVIATIONS = 4.0  # of a sample's rank: of 14,400 random rows none had to be selected from as a whole
_WORTHWHILE = 8 * _SAMPLE  # numbers of a row


def smallest(values_GS: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the `count` smallest numbers of every row are, in no order: (G, K). NaN counts as the largest.

    A sample tells between which two numbers the count-th smallest is, and only what lies there is selected from: a
    third of the time of `np.argpartition`, whose results these are (ties aside).
    """
    G, S = values_GS.shape
    if S < _WORTHWHILE or not 0 < count < S:
        return np.argpartition(values_GS, count - 1, axis=-1)[:, :count]
    sample_GX = np.sort(values_GS[:, :: S // _SAMPLE], axis=-1)
    rank = count / S * sample_GX.shape[1]
    spread = _DEVIATIONS * math.sqrt(rank * (1 - count / S)) + 1
    low_G = sample_GX[:, max(0, math.floor(rank - spread))]
    high_G = sample_GX[:, min(sample_GX.shape[1] - 1, math.ceil(rank + spread))]
    chosen_GK = np.empty((G, count), dtype=np.int64)
    for values_S, low, high, chosen_K in zip(values_GS, low_G, high_G, chosen_GK, strict=True):
        below = np.flatnonzero(values_S < low)
        between = np.flatnonzero((values_S >= low) & (values_S <= high))
        missing = count - len(below)
        if 0 < missing <= len(between):
            chosen_K[: len(below)] = below
            chosen_K[len(below) :] = between[np.argpartition(values_S[between], missing - 1)[:missing]]
        else:
            chosen_K[:] = np.argpartition(values_S, count - 1)[:count]
    return chosen_GK
