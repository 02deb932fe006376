"""The logit codec's channels in blocks of 8 × 8 pixels, by frequency: what neighbouring pixels share is stored once.

The basis is that of `logit`, in which a rounding step costs the same in the mask logits whatever the channel. An
orthonormal cosine transform of blocks changes nothing of that, but turns a smooth channel into a few large numbers and
many that round to zero. Of all planes (a channel at a frequency) only those stronger than half a step are stored, the
strongest first, so that equally predictable numbers lie side by side and Zstandard packs them well.

Shapes: T frames, C map channels, K kept channels, F = 64 frequencies, N kept planes, P of them wide, R = N + P
stored numbers of a block, H×W the map, h×w its blocks, S = h·w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.codecs.arrays import checked_arrays
from cache.codecs.blocks import BLOCK, FREQUENCIES, Planes, block_grid
from cache.codecs.digits import LEVELS, WIDE_DEVIATIONS, two_digits
from cache.codecs.fit import Statistics
from cache.codecs.logit import logit_metric, rounding_step
from cache.codecs.plane_products import Products
from cache.errors import CorruptData
from cache.layout import Size

WEAKEST = 1 / 4
"""Variance of the weakest planes that are kept, in steps. Below, the bits spent buy less than those of a finer step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectral:
    """v = rounded cosine transform of projection · (m − mean), and back: m ≈ basis · inverse transform of v + mean."""

    name: ClassVar[str] = "spectral"
    dtype: ClassVar[np.dtype[Any]] = np.dtype("i1")
    compressed: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK

    projection_KC: NDArray[np.float32]
    basis_CK: NDArray[np.float32]
    mean_C: NDArray[np.float32]
    plane_N: NDArray[np.float32]
    """Numbers of the kept planes, channel · 64 + frequency, strongest first."""
    num_wide: int
    relative_step: float
    """The step as a share of the logits' standard deviation."""
    identity_share: float
    """λ."""

    @classmethod
    def fit(cls, statistics: Statistics, *, relative_step: float, identity_share: float) -> Spectral:
        """Fit to a calibration sample. Raises CacheError where embeddings or features never vary."""
        step = rounding_step(statistics, relative_step)
        root_CC, inverse_CC = logit_metric(statistics, identity_share)
        _, turn_CC = np.linalg.eigh(root_CC @ statistics.covariance_CC @ root_CC)
        projection_CC = turn_CC[:, ::-1].T @ root_CC / step
        moments_FCC = statistics.frequency_moment_FCC
        variance_CF = np.einsum("kc,fcd,kd->kf", projection_CC, moments_FCC, projection_CC, optimize=True)
        number_N = np.flatnonzero(variance_CF >= min(WEAKEST, variance_CF.max()))
        number_N = number_N[np.argsort(-variance_CF.ravel()[number_N], kind="stable")]
        kept, channel_N = np.unique(number_N // FREQUENCIES, return_inverse=True)
        return cls(
            projection_KC=projection_CC[kept].astype(np.float32),
            basis_CK=(inverse_CC @ turn_CC[:, ::-1][:, kept] * step).astype(np.float32),
            mean_C=statistics.mean_C.astype(np.float32),
            plane_N=(channel_N * FREQUENCIES + number_N % FREQUENCIES).astype(np.float32),
            num_wide=int((WIDE_DEVIATIONS * np.sqrt(variance_CF) > LEVELS).sum()),
            relative_step=relative_step,
            identity_share=identity_share,
        )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What is not an array; the step and λ only tell how it was fitted."""
        return {
            "num_wide": self.num_wide,
            "relative_step": self.relative_step,
            "identity_share": self.identity_share,
        }

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """`projection` (K, C), `basis` (C, K), `mean` (C) and `plane` (N)."""
        return {"projection": self.projection_KC, "basis": self.basis_CK, "mean": self.mean_C, "plane": self.plane_N}

    @classmethod
    def load(cls, parameters: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Spectral:
        """Rebuild from what is stored. Raises CorruptData where it does not fit together."""
        shapes = {"projection": ("K", "C"), "basis": ("C", "K"), "mean": ("C",), "plane": ("N",)}
        found = checked_arrays("spectral", arrays, shapes)
        try:
            codec = cls(
                projection_KC=found["projection"],
                basis_CK=found["basis"],
                mean_C=found["mean"],
                plane_N=found["plane"],
                **parameters,
            )
        except TypeError as error:
            raise CorruptData("codec spectral: wrong parameters", got=repr(parameters)) from error
        if type(codec.num_wide) is not int or not 0 <= codec.num_wide <= len(codec.plane_N):
            raise CorruptData("codec spectral: impossible num_wide", got=repr(codec.num_wide))
        most = len(codec.projection_KC) * FREQUENCIES
        numbers = set(codec.plane_N.tolist())
        if len(numbers) < len(codec.plane_N) or not numbers <= set(range(most)):
            raise CorruptData("codec spectral: impossible planes", expected=f"different whole numbers below {most}")
        return codec

    @cached_property
    def planes(self) -> Planes:
        """What is stored of which channel and frequency."""
        return Planes(
            number_N=self.plane_N.astype(np.int64), num_wide=self.num_wide, num_channels=len(self.projection_KC)
        )

    @cached_property
    def _products(self) -> Products:
        return Products.of(self.projection_KC, self.mean_C, self.planes)

    def stored_channels(self, num_channels: int) -> int:
        """R; independent of C, which the arrays fix."""
        return len(self.plane_N) + self.num_wide

    def encode(self, mask_features_TCHW: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """(T, C, H, W) -> (T, R, h, w) int8; values beyond ±127 (wide planes: ±32,639) steps saturate."""
        num_frames, _, height, width = mask_features_TCHW.shape
        h, w = block_grid((height, width), BLOCK)
        kept, wide = len(self.plane_N), self.num_wide
        stored = np.empty((num_frames, kept + wide, h * w), self.dtype)
        # Frame by frame: the last bits of products depend on their sizes, and may tip what is rounded.
        for row_RS, features_CHW in zip(stored, mask_features_TCHW, strict=True):
            steps_NS = self._products.steps(features_CHW.astype(np.float32, copy=False))
            np.rint(steps_NS, out=steps_NS)
            row_RS[:wide], row_RS[kept:] = two_digits(steps_NS[:wide])
            row_RS[wide:kept] = np.clip(steps_NS[wide:], -LEVELS, LEVELS, out=steps_NS[wide:])
        return stored.reshape(num_frames, -1, h, w)

    def decode(self, stored_TRhw: NDArray[Any], map_hw: Size | None = None) -> NDArray[np.float32]:
        """(T, R, h, w) int8 -> (T, C, H, W) float32."""
        channels_TKHW = self.planes.expand(stored_TRhw, map_hw)
        decoded = np.einsum("ck,tkhw->tchw", self.basis_CK, channels_TKHW, optimize=True)
        return np.asarray(decoded + self.mean_C[:, None, None], np.float32)

    def fold(
        self, mask_embeddings: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """Mask embeddings (..., C) -> ((..., K), constant (...)): logits = embedding · `planes.expand` + constant."""
        return mask_embeddings @ self.basis_CK, mask_embeddings @ self.mean_C
