"""Features and mask embeddings as a detector has them: rectified, smooth, and looked at in few directions only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.codecs.fit import Statistics, StatisticsAccumulator
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.logit import Logit
from cache.codecs.spectral import Spectral

NUM_CHANNELS = 16
SEEN = 4
"""Directions that the embeddings look at; the features vary least there."""


def features(seed: int, num_frames: int = 6) -> NDArray[np.float32]:
    """(T, C, 14, 18), not negative, about half of it zero."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_frames, NUM_CHANNELS, 16, 20))
    smooth = (noise[..., :-2, :-2] + noise[..., 1:-1, :-2] + noise[..., :-2, 1:-1] + noise[..., 2:, 2:]) / 2
    strength = np.where(np.arange(NUM_CHANNELS) < SEEN, 0.3, 3.0)
    mixed = np.einsum("cd,tdhw->tchw", mixing(), smooth * strength[:, None, None])
    return np.maximum(mixed, 0).astype(np.float32)


def embeddings(seed: int, number: int = 200) -> NDArray[np.float32]:
    """(N, C)."""
    rng = np.random.default_rng(seed)
    strength = np.where(np.arange(NUM_CHANNELS) < SEEN, 4.0, 0.02)
    return np.asarray((rng.standard_normal((number, NUM_CHANNELS)) * strength) @ mixing().T, np.float32)


def mixing() -> NDArray[np.float64]:
    """A rotation (C, C), always the same."""
    return np.linalg.qr(np.random.default_rng(99).standard_normal((NUM_CHANNELS, NUM_CHANNELS)))[0]


def statistics() -> Statistics:
    accumulator = StatisticsAccumulator(NUM_CHANNELS)
    for seed in range(3):
        accumulator.add(features(seed), embeddings(seed))
    return accumulator.statistics()


def fitted_codecs() -> dict[str, Codec]:
    found = statistics()
    return {
        "float16": Float16(),
        "int8": Int8.fit(found),
        "logit": Logit.fit(found, relative_step=1 / 64, identity_share=0.01),
        "spectral": Spectral.fit(found, relative_step=1 / 64, identity_share=0.01),
    }
