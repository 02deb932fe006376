"""Small integers in the basis in which the mask logits see the features.

A mask feature m is never looked at itself: it only meets mask embeddings e in dot products. With the embeddings'
second moment M = E[e eᵀ], an error δ costs E[(e·δ)²] = δᵀ M δ. So the features are centred, measured in that
metric (W = M^½), turned to the eigenvectors of their covariance there, and rounded with one step for all channels:
the same logit error everywhere, many levels for strong channels, few for weak ones, and none for those below the
rounding noise itself (reverse water-filling). M is blended with λ·identity (of equal trace), so that directions
which the detector's embeddings leave out are kept too: the head learns embeddings of its own.

Shapes: T frames, C map channels, K kept channels, P of them wide, R = K + P stored channels, H×W the stored map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.codecs.arrays import checked_arrays
from cache.codecs.digits import DIGIT, LEVELS, WIDE_DEVIATIONS, two_digits
from cache.codecs.fit import Statistics
from cache.errors import CacheError, CorruptData
from cache.layout import Size


@dataclass(frozen=True, kw_only=True, eq=False)
class Logit:
    """v = round(projection · (m − mean)) and m ≈ basis · v + mean.

    Strongest channels first. The first P are stored as two digits, v = low + 256 · high, the others as v, all of
    them int8: the K low digits, then the P high ones. The code stays linear in what is stored.
    """

    name: ClassVar[str] = "logit"
    dtype: ClassVar[np.dtype[Any]] = np.dtype("i1")
    compressed: ClassVar[bool] = True
    block: ClassVar[int] = 1
    planes: ClassVar[None] = None

    projection_KC: NDArray[np.float32]
    basis_CK: NDArray[np.float32]
    mean_C: NDArray[np.float32]
    num_wide: int
    relative_step: float
    """The step as a share of the logits' standard deviation."""
    identity_share: float
    """λ."""

    @classmethod
    def fit(cls, statistics: Statistics, *, relative_step: float, identity_share: float) -> Logit:
        """Fit to a calibration sample. Raises CacheError where embeddings or features never vary."""
        step = rounding_step(statistics, relative_step)
        root_CC, inverse_CC = logit_metric(statistics, identity_share)
        variance_K, turn_CK = np.linalg.eigh(root_CC @ statistics.covariance_CC @ root_CC)
        # Rounding to a step has variance step² / 12: a weaker channel is better left out.
        kept = np.flatnonzero(variance_K >= min(step**2 / 12, variance_K[-1]))[::-1]
        deviation_K, turn_CK = np.sqrt(variance_K[kept]), turn_CK[:, kept]
        return cls(
            projection_KC=(turn_CK.T @ root_CC / step).astype(np.float32),
            basis_CK=(inverse_CC @ turn_CK * step).astype(np.float32),
            mean_C=statistics.mean_C.astype(np.float32),
            num_wide=int((WIDE_DEVIATIONS * deviation_K > LEVELS * step).sum()),
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
        """`projection` (K, C), `basis` (C, K) and `mean` (C)."""
        return {"projection": self.projection_KC, "basis": self.basis_CK, "mean": self.mean_C}

    @classmethod
    def load(cls, parameters: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Logit:
        """Rebuild from what is stored. Raises CorruptData where it does not fit together."""
        shapes = {"projection": ("K", "C"), "basis": ("C", "K"), "mean": ("C",)}
        found = checked_arrays("logit", arrays, shapes)
        try:
            codec = cls(projection_KC=found["projection"], basis_CK=found["basis"], mean_C=found["mean"], **parameters)
        except TypeError as error:
            raise CorruptData("codec logit: wrong parameters", got=repr(parameters)) from error
        if type(codec.num_wide) is not int or not 0 <= codec.num_wide <= len(codec.projection_KC):
            raise CorruptData("codec logit: impossible num_wide", got=repr(codec.num_wide))
        return codec

    def stored_channels(self, num_channels: int) -> int:
        """R; independent of C, which the arrays fix."""
        return len(self.projection_KC) + self.num_wide

    def encode(self, mask_features_TCHW: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """(T, C, H, W) -> (T, R, H, W) int8; values beyond ±127 (wide channels: ±32,639) steps saturate."""
        num_frames, num_channels, height, width = mask_features_TCHW.shape
        stored = np.empty((num_frames, self.stored_channels(num_channels), height * width), self.dtype)
        offset_K1 = (self.projection_KC @ self.mean_C)[:, None]
        kept, wide = len(self.projection_KC), self.num_wide
        for row_RS, features_CHW in zip(stored, mask_features_TCHW, strict=True):
            steps_KS = self.projection_KC @ features_CHW.reshape(num_channels, -1).astype(np.float32, copy=False)
            np.rint(np.subtract(steps_KS, offset_K1, out=steps_KS), out=steps_KS)
            row_RS[wide:kept] = np.clip(steps_KS[wide:], -LEVELS, LEVELS, out=steps_KS[wide:])
            row_RS[:wide], row_RS[kept:] = two_digits(steps_KS[:wide])
        return stored.reshape(num_frames, -1, height, width)

    def decode(self, stored_TRHW: NDArray[Any], map_hw: Size | None = None) -> NDArray[np.float32]:
        """(T, R, H, W) int8 -> (T, C, H, W) float32."""
        decoded = np.einsum("cr,trhw->tchw", self._stored_basis, stored_TRHW.astype(np.float32), optimize=True)
        return np.asarray(decoded + self.mean_C[:, None, None], np.float32)

    def fold(
        self, mask_embeddings: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """Mask embeddings (..., C) -> ((..., R), constant (...)): logits = embedding · stored + constant."""
        return mask_embeddings @ self._stored_basis, mask_embeddings @ self.mean_C

    @property
    def _stored_basis(self) -> NDArray[np.float32]:
        """(C, R)."""
        return np.concatenate([self.basis_CK, self.basis_CK[:, : self.num_wide] * np.float32(DIGIT)], axis=1)


def rounding_step(statistics: Statistics, relative_step: float) -> float:
    """The step that is this share of the logits' standard deviation. Raises CacheError where they do not vary."""
    step = relative_step * statistics.logit_std
    if not step > 0:
        raise CacheError("the logit codec cannot be fitted: the logits of the calibration frames do not vary")
    return step


def logit_metric(statistics: Statistics, identity_share: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """W = M^½ and its inverse, both (C, C), for the second moment of the embeddings blended with λ·identity."""
    moment_CC, num_channels = statistics.embedding_moment_CC, len(statistics.mean_C)
    isotropic_CC = np.trace(moment_CC) / num_channels * np.eye(num_channels)
    squares_C, axes_CC = np.linalg.eigh((1 - identity_share) * moment_CC + identity_share * isotropic_CC)
    return (axes_CC * squares_C**0.5) @ axes_CC.T, (axes_CC * squares_C**-0.5) @ axes_CC.T
