"""Checking the fitted arrays that a codec is rebuilt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.heads import axis_sizes


def checked_arrays(
    codec: str, arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[str, ...]]
) -> dict[str, NDArray[np.float32]]:
    """The arrays, if they are exactly those of `shapes` (name -> symbolic axes), float32 and finite.

    Raises CorruptData naming the codec and the array.
    """
    if arrays.keys() != shapes.keys():
        raise CorruptData(f"codec {codec}: wrong arrays", expected=sorted(shapes), got=sorted(arrays))
    axis_sizes(arrays, shapes, CorruptData, f"codec {codec}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise CorruptData(f"codec {codec}: array {name!r} is not finite")
    return dict(arrays)
