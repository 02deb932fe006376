"""What fitted codecs are fitted to: moments of mask features and of mask embeddings, in one pass over frames.

Shapes: T frames, C map channels, H×W the stored map, F frequencies, S blocks, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.codecs.blocks import BLOCK, FREQUENCIES, to_blocks
from cache.errors import CacheError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of a calibration sample, float64."""

    mean_C: Floats
    """Of the features."""
    covariance_CC: Floats
    """Of the features."""
    frequency_moment_FCC: Floats
    """Of the cosine coefficients of the features less their mean, by frequency (blocks.py); not centred."""
    minimum_C: Floats
    maximum_C: Floats
    embedding_moment_CC: Floats
    """E[e eᵀ], not centred, of the mask embeddings in the space of the features."""

    @property
    def logit_std(self) -> float:
        """Standard deviation of e · m over embeddings and pixels, without the part that is the same in all pixels."""
        return float(np.sqrt(max(np.trace(self.embedding_moment_CC @ self.covariance_CC), 0.0)))


class StatisticsAccumulator:
    """Adds up a calibration sample frame by frame; memory is F × C × C, however many frames come.

    The features' second moments are taken about the mean of the first frames, so that nothing cancels.
    """

    def __init__(self, num_channels: int) -> None:
        self._origin_C: Floats | None = None
        self._minimum_C, self._maximum_C = np.full(num_channels, np.inf), np.full(num_channels, -np.inf)
        self._sum_C, self._outer_CC = np.zeros(num_channels), np.zeros((num_channels, num_channels))
        self._embedding_outer_CC = np.zeros((num_channels, num_channels))
        self._frequency_outer_FCC = np.zeros((FREQUENCIES, num_channels, num_channels))
        self._constant_sum_C = np.zeros(num_channels)
        self._num_pixels = self._num_blocks = self._num_embeddings = 0

    def add(self, mask_features_TCHW: NDArray[np.floating[Any]], embeddings_NC: NDArray[np.floating[Any]]) -> None:
        """Add frames and the mask embeddings that meet them. Raises CacheError where numbers are not finite."""
        shape_THW = (len(mask_features_TCHW), *mask_features_TCHW.shape[2:])
        features_CN = np.moveaxis(mask_features_TCHW, 1, 0).reshape(len(self._sum_C), -1).astype(np.float64)
        embeddings_NC = embeddings_NC.reshape(-1, len(self._sum_C)).astype(np.float64)
        if not (np.isfinite(features_CN).all() and np.isfinite(embeddings_NC).all()):
            raise CacheError("a codec cannot be fitted to features or embeddings that are not finite")
        self._minimum_C = np.minimum(self._minimum_C, features_CN.min(axis=1))
        self._maximum_C = np.maximum(self._maximum_C, features_CN.max(axis=1))
        if self._origin_C is None:
            self._origin_C = features_CN.mean(axis=1)
        centred_CN = features_CN - self._origin_C[:, None]
        self._sum_C += centred_CN.sum(axis=1)
        self._outer_CC += centred_CN @ centred_CN.T
        self._num_pixels += features_CN.shape[1]
        for centred_CHW in np.moveaxis(centred_CN.reshape(len(self._sum_C), *shape_THW), 1, 0):
            self._add_blocks(to_blocks(centred_CHW).transpose(1, 0, 2))
        self._embedding_outer_CC += embeddings_NC.T @ embeddings_NC
        self._num_embeddings += len(embeddings_NC)

    def _add_blocks(self, coefficients_FCS: NDArray[np.floating[Any]]) -> None:
        self._frequency_outer_FCC += coefficients_FCS @ coefficients_FCS.transpose(0, 2, 1)
        self._constant_sum_C += coefficients_FCS[0].sum(axis=1)
        self._num_blocks += coefficients_FCS.shape[2]

    def _frequency_moments(self, shift_C: Floats) -> Floats:
        """Moments about the mean, which is `shift_C` off the origin: a constant in the first frequency alone."""
        moments_FCC = self._frequency_outer_FCC / self._num_blocks
        mean_C, constant_C = self._constant_sum_C / self._num_blocks, BLOCK * shift_C
        crossed_CC = np.outer(mean_C, constant_C)
        moments_FCC[0] += np.outer(constant_C, constant_C) - crossed_CC - crossed_CC.T
        return moments_FCC

    def statistics(self) -> Statistics:
        """The moments so far. Raises CacheError where nothing was added."""
        if self._origin_C is None or not self._num_embeddings:
            raise CacheError("no frames to fit a codec to")
        shift_C = self._sum_C / self._num_pixels
        return Statistics(
            mean_C=self._origin_C + shift_C,
            covariance_CC=self._outer_CC / self._num_pixels - np.outer(shift_C, shift_C),
            frequency_moment_FCC=self._frequency_moments(shift_C),
            minimum_C=self._minimum_C,
            maximum_C=self._maximum_C,
            embedding_moment_CC=self._embedding_outer_CC / self._num_embeddings,
        )
