"""Mask features to the planes that the spectral codec stores, in steps, by whichever order of products is faster.

Shapes: C map channels, K kept channels, F = 64 frequencies, N kept planes, H×W the map, h×w its blocks, S = h·w.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cache.codecs.blocks import BLOCK, FREQUENCIES, Planes, block_grid, to_blocks

_FEW_BLOCKS = 64
"""Products of so few columns cost more in calls than in arithmetic (demo: 1.0 against .65 ms a frame)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Both orders; a map's size and the codec decide, so that equal maps always give equal bits."""

    projection_KC: NDArray[np.float32]
    constant_K: NDArray[np.float32]
    """What the mean, which is the same in all pixels, makes of the channels."""
    planes: Planes

    @classmethod
    def of(cls, projection_KC: NDArray[np.float32], mean_C: NDArray[np.float32], planes: Planes) -> Products:
        """Of the codec's arrays."""
        return cls(projection_KC=projection_KC, constant_K=projection_KC @ mean_C, planes=planes)

    def steps(self, features_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """(C, H, W) -> (N, S)."""
        most_are_kept = 2 * len(self.planes.number_N) > FREQUENCIES * len(self.projection_KC)
        h, w = block_grid((features_CHW.shape[1], features_CHW.shape[2]), BLOCK)
        if most_are_kept and h * w <= _FEW_BLOCKS:
            return self._whole_channels(features_CHW)
        return self._by_frequency.steps(features_CHW)

    def _whole_channels(self, features_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """All channels in one product, then all frequencies of each."""
        C, H, W = features_CHW.shape
        channels_KS = self.projection_KC @ features_CHW.reshape(C, H * W)
        channels_KS -= self.constant_K[:, None]
        coefficients_KFS = to_blocks(channels_KS.reshape(-1, H, W))
        return np.asarray(coefficients_KFS.reshape(-1, coefficients_KFS.shape[2])[self.planes.number_N], np.float32)

    @cached_property
    def _by_frequency(self) -> _ByFrequency:
        return _ByFrequency.of(self)


@dataclass(frozen=True, kw_only=True)
class _ByFrequency:
    """Features to planes, frequency by frequency: products of what is kept alone."""

    frequencies: NDArray[np.int64]
    projections: tuple[NDArray[np.float32], ...]
    """(n, C) of the n planes of each of these frequencies."""
    order_N: NDArray[np.int64]
    """Where each plane's row is among the planes by frequency."""
    offset_N1: NDArray[np.float32]
    """What the mean, which is the same in all pixels, makes of the planes by frequency."""

    @classmethod
    def of(cls, products: Products) -> _ByFrequency:
        channel_N, frequency_N = np.divmod(products.planes.number_N, FREQUENCIES)
        by_frequency_N = np.argsort(frequency_N, kind="stable")
        frequencies, starts = np.unique(frequency_N[by_frequency_N], return_index=True)
        offset_N = np.where(frequency_N == 0, BLOCK * products.constant_K[channel_N], np.float32(0))
        return cls(
            frequencies=frequencies,
            projections=tuple(np.split(products.projection_KC[channel_N[by_frequency_N]], starts[1:])),
            order_N=np.argsort(by_frequency_N),
            offset_N1=offset_N[by_frequency_N, None],
        )

    def steps(self, features_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """(C, H, W) -> (N, S)."""
        coefficients_CFS = to_blocks(features_CHW, self.frequencies)
        rows = enumerate(self.projections)
        planes_NS = np.concatenate([projection_nC @ coefficients_CFS[:, row] for row, projection_nC in rows])
        planes_NS -= self.offset_N1
        return np.asarray(planes_NS[self.order_N], np.float32)
