"""What the frozen detector predicts from its cached queries, in NumPy: enough to judge a codec.

Shapes: Q queries (any leading axes), C query channels, F channels of the FPN map, E mask embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.heads import DetectorHeads

Floats = NDArray[np.float32]
NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class QueryPredictions:
    """Predictions of queries: mask logits are embedding · FPN map + constant."""

    embeddings_QF: Floats
    """Mask embeddings folded through the detector's own 1×1 convolution."""
    constant_Q: Floats
    object_probability_Q: Floats
    """1 − probability of "no object"."""


def predict_queries(heads: DetectorHeads, frame_queries_QC: NDArray[np.floating[Any]]) -> QueryPredictions:
    """Mask embeddings and object probabilities of pre-norm frame queries (..., C)."""
    weights = heads.arrays
    centred = frame_queries_QC.astype(np.float32)
    centred = centred - centred.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    normed = normed * weights["decoder_norm.weight"] + weights["decoder_norm.bias"]
    hidden = normed
    for layer in range(3):
        hidden = hidden @ weights[f"mask_embed.layers.{layer}.weight"].T + weights[f"mask_embed.layers.{layer}.bias"]
        if layer < 2:
            hidden = np.maximum(hidden, 0)
    logits = normed @ weights["class_embed.weight"].T + weights["class_embed.bias"]
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return QueryPredictions(
        embeddings_QF=hidden @ weights["mask_features.weight"],
        constant_Q=hidden @ weights["mask_features.bias"],
        object_probability_Q=1 - odds[..., -1] / odds.sum(axis=-1),
    )
