"""What fitted codecs are fitted to: moments of mask features and of mask embeddings, in one pass over frames.

Shapes: T frames, C map channels, H×W the stored map, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CacheError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of a calibration sample, float64."""

    mean_C: Floats
    """Of the features."""
    covariance_CC: Floats
    """Of the features."""
    minimum_C: Floats
    maximum_C: Floats
    embedding_moment_CC: Floats
    """E[e eᵀ], not centred, of the mask embeddings in the space of the features."""

    @property
    def logit_std(self) -> float:
        """Standard deviation of e · m over embeddings and pixels, without the part that is the same in all pixels."""
        return float(np.sqrt(max(np.trace(self.embedding_moment_CC @ self.covariance_CC), 0.0)))


class StatisticsAccumulator:
    """Adds up a calibration sample frame by frame; memory is C × C, however many frames come.

    The features' second moments are taken about the mean of the first frames, so that nothing cancels.
    """

    def __init__(self, num_channels: int) -> None:
        self._origin_C: Floats | None = None
        self._minimum_C, self._maximum_C = np.full(num_channels, np.inf), np.full(num_channels, -np.inf)
        self._sum_C, self._outer_CC = np.zeros(num_channels), np.zeros((num_channels, num_channels))
        self._embedding_outer_CC = np.zeros((num_channels, num_channels))
        self._num_pixels = self._num_embeddings = 0

    def add(self, mask_features_TCHW: NDArray[np.floating[Any]], embeddings_NC: NDArray[np.floating[Any]]) -> None:
        """Add frames and the mask embeddings that meet them. Raises CacheError where numbers are not finite."""
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
        self._embedding_outer_CC += embeddings_NC.T @ embeddings_NC
        self._num_embeddings += len(embeddings_NC)

    def statistics(self) -> Statistics:
        """The moments so far. Raises CacheError where nothing was added."""
        if self._origin_C is None or not self._num_embeddings:
            raise CacheError("no frames to fit a codec to")
        shift_C = self._sum_C / self._num_pixels
        return Statistics(
            mean_C=self._origin_C + shift_C,
            covariance_CC=self._outer_CC / self._num_pixels - np.outer(shift_C, shift_C),
            minimum_C=self._minimum_C,
            maximum_C=self._maximum_C,
            embedding_moment_CC=self._embedding_outer_CC / self._num_embeddings,
        )
