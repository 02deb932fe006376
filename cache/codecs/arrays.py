"""Checking the fitted arrays that a codec is rebuilt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData


def checked_arrays(
    codec: str, arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[str, ...]]
) -> dict[str, NDArray[np.float32]]:
    """The arrays, if they are exactly those of `shapes` (name -> symbolic axes), float32 and finite.

    Raises CorruptData naming the codec and the array.
    """
    if arrays.keys() != shapes.keys():
        raise CorruptData(f"codec {codec}: wrong arrays", expected=sorted(shapes), got=sorted(arrays))
    sizes: dict[str, int] = {}
    for name, symbols in shapes.items():
        array = arrays[name]
        expected = tuple(sizes.setdefault(s, n) for s, n in zip(symbols, array.shape, strict=False))
        if array.dtype != np.float32 or array.ndim != len(symbols) or array.shape != expected:
            got = f"{array.dtype} {array.shape}"
            raise CorruptData(f"codec {codec}: array {name!r} does not fit", expected=f"float32 {symbols}", got=got)
        if not np.isfinite(array).all():
            raise CorruptData(f"codec {codec}: array {name!r} is not finite")
    return dict(arrays)
