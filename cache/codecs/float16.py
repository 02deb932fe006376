"""Mask features as they are, in float16: 16 bits a number, no parameters, relative error at most 2**-11."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import Size


@dataclass(frozen=True, kw_only=True)
class Float16:
    """The identity up to rounding: stored channels are the channels."""

    name: ClassVar[str] = "float16"
    dtype: ClassVar[np.dtype[Any]] = np.dtype("<f2")
    compressed: ClassVar[bool] = False
    block: ClassVar[int] = 1
    planes: ClassVar[None] = None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Nothing to remember."""
        return {}

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Nothing to remember."""
        return {}

    @classmethod
    def load(cls, parameters: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Float16:
        """Rebuild from what is stored. Raises CorruptData where anything is: float16 has no parameters."""
        if parameters or arrays:
            raise CorruptData("codec float16 has no parameters", got=[*parameters, *arrays])
        return cls()

    def stored_channels(self, num_channels: int) -> int:
        """R of C."""
        return num_channels

    def encode(self, mask_features_TCHW: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """(T, C, H, W) -> (T, R, H, W) float16; beyond ±65504 infinite, which the writer refuses."""
        with np.errstate(over="ignore"):
            return mask_features_TCHW.astype(self.dtype)

    def decode(self, stored_TRHW: NDArray[Any], map_hw: Size | None = None) -> NDArray[np.float32]:
        """(T, R, H, W) float16 -> (T, C, H, W) float32."""
        return stored_TRHW.astype(np.float32)

    def fold(self, mask_embeddings: NDArray[np.floating[Any]]) -> tuple[NDArray[np.floating[Any]], None]:
        """Mask embeddings (..., C) -> ((..., R), no constant): logits = embedding · stored + constant."""
        return mask_embeddings, None
