"""Whole numbers in one byte or two, so that what is stored stays linear: v = low + 256 · high, both int8.

Shapes: P wide channels or planes, S positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 127
DIGIT = 256
WIDE_DEVIATIONS = 12.0
"""What has more than 127 / 12 steps of standard deviation gets a second digit."""
LARGEST = LEVELS * DIGIT + LEVELS


def two_digits(values_PS: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Low and high digits of whole numbers, v = low + 256 · high; beyond ±32,639 they saturate."""
    whole_PS = np.clip(values_PS, -LARGEST, LARGEST).astype(np.int32)
    high_PS = (whole_PS + DIGIT // 2) // DIGIT
    return whole_PS - high_PS * DIGIT, high_PS
