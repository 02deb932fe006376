"""Codecs: calibration sample, round trips, the fold, and what the logit codec is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.codecs.fit import StatisticsAccumulator
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.logit import Logit
from cache.errors import CacheError
from tests.codec_samples import NUM_CHANNELS, SEEN, embeddings, features, fitted_codecs, statistics

NAMES = ("float16", "int8", "logit", "spectral")


@pytest.fixture(scope="module")
def codecs() -> dict[str, Codec]:
    return fitted_codecs()


# The calibration sample


def test_streamed_moments_are_those_of_the_whole_sample() -> None:
    maps = np.concatenate([features(seed) for seed in range(3)]).astype(np.float64)
    vectors = np.concatenate([embeddings(seed) for seed in range(3)]).astype(np.float64)
    pixels = maps.transpose(1, 0, 2, 3).reshape(NUM_CHANNELS, -1)
    found = statistics()
    np.testing.assert_allclose(found.mean_C, pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_CC, np.cov(pixels, bias=True), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal([found.minimum_C, found.maximum_C], [pixels.min(axis=1), pixels.max(axis=1)])
    moment = sum(np.outer(e, e) for e in vectors) / len(vectors)
    np.testing.assert_allclose(found.embedding_moment_CC, moment, rtol=1e-9, atol=1e-9)
    logits = vectors @ (pixels - pixels.mean(axis=1, keepdims=True))
    assert found.logit_std == pytest.approx(logits.std(), rel=1e-3)


def test_moments_far_from_zero_do_not_cancel() -> None:
    accumulator = StatisticsAccumulator(1)
    values = np.random.default_rng(0).standard_normal((50, 1, 8, 8)) * 1e-3 + 1e6
    for start in range(0, 50, 10):
        accumulator.add(values[start : start + 10], np.ones((1, 1)))
    assert accumulator.statistics().covariance_CC[0, 0] == pytest.approx(values.var(), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_fitted_to_numbers_that_are_not_finite(bad: float) -> None:
    maps, vectors = features(0), embeddings(0)
    maps[1, 2, 3, 4] = bad
    with pytest.raises(CacheError, match="not finite"):
        StatisticsAccumulator(NUM_CHANNELS).add(maps, vectors)
    with pytest.raises(CacheError, match="no frames"):
        StatisticsAccumulator(NUM_CHANNELS).statistics()


# float16


def test_float16_keeps_eleven_bits() -> None:
    maps = features(5)
    decoded = Float16().decode(Float16().encode(maps))
    assert (np.abs(decoded - maps) <= 2.0**-11 * np.abs(maps) + 2.0**-25).all()


# int8


def test_int8_is_within_half_a_step_and_keeps_zero(codecs: dict[str, Codec]) -> None:
    codec, maps = codecs["int8"], features(1)
    assert isinstance(codec, Int8)
    decoded = codec.decode(codec.encode(maps))
    assert (np.abs(decoded - maps) <= codec.step_C[:, None, None] * 0.501).all()
    assert (maps == 0).mean() > 0.3
    assert np.abs(decoded[maps == 0]).max() <= 1e-5 * codec.step_C.max()


def test_int8_saturates_beyond_its_range(codecs: dict[str, Codec]) -> None:
    stored = codecs["int8"].encode(np.full((1, NUM_CHANNELS, 2, 2), 1e6, np.float32))
    assert (stored == 127).all()


def test_int8_of_constant_channels() -> None:
    accumulator = StatisticsAccumulator(2)
    maps = np.broadcast_to(np.array([0.0, 7.0], np.float32)[:, None, None], (2, 2, 4, 4))
    accumulator.add(maps, np.ones((3, 2)))
    codec = Int8.fit(accumulator.statistics())
    np.testing.assert_allclose(codec.decode(codec.encode(maps)), maps, atol=1e-3)


# logit


def test_logit_rounds_every_kept_channel_to_half_a_step(codecs: dict[str, Codec]) -> None:
    codec, maps = codecs["logit"], features(7)
    assert isinstance(codec, Logit)

    def steps(values: NDArray[np.float32]) -> NDArray[Any]:
        return np.einsum("kc,tchw->tkhw", codec.projection_KC, values - codec.mean_C[:, None, None])

    assert np.abs(steps(codec.decode(codec.encode(maps))) - steps(maps)).max() <= 0.501


def test_two_digits_worked_by_hand() -> None:
    codec = Logit(
        projection_KC=np.eye(2, dtype=np.float32),
        basis_CK=np.eye(2, dtype=np.float32),
        mean_C=np.zeros(2, np.float32),
        num_wide=1,
        relative_step=1.0,
        identity_share=1.0,
    )
    values = np.array([[300, -300, 128, -129, 1e6, -1e6], [300, -300, 5.4, 5.6, 0, 0]], np.float32)
    stored = codec.encode(values.reshape(1, 2, 1, 6))
    expected = [[44, -44, -128, 127, 127, -127], [127, -127, 5, 6, 0, 0], [1, -1, 1, -1, 127, -127]]
    np.testing.assert_array_equal(stored[0, :, 0], expected)
    decoded = [[300, -300, 128, -129, 32639, -32639], [127, -127, 5, 6, 0, 0]]
    np.testing.assert_array_equal(codec.decode(stored)[0, :, 0], decoded)


def test_channels_below_the_rounding_noise_drop_out() -> None:
    rng = np.random.default_rng(0)
    deviation = np.array([8.0, 1.0, 0.30, 0.27])  # the step is 1, its noise 12 ** -0.5 = 0.289
    accumulator = StatisticsAccumulator(4)
    accumulator.add(rng.standard_normal((40, 4, 20, 20)) * deviation[:, None, None], np.eye(4) * 2)
    found = accumulator.statistics()
    codec = Logit.fit(found, relative_step=1 / found.logit_std, identity_share=0.5)
    assert codec.stored_channels(4) == 3 and codec.num_wide == 0
    assert np.abs(codec.projection_KC).argmax(axis=1).tolist() == [0, 1, 2]
    assert np.abs(codec.projection_KC).max(axis=1) == pytest.approx(1.0, rel=0.02)


def test_all_identity_is_plain_principal_components() -> None:
    codec = Logit.fit(statistics(), relative_step=1 / 32, identity_share=1.0)
    pixels = np.concatenate([features(seed) for seed in range(3)]).transpose(1, 0, 2, 3).reshape(NUM_CHANNELS, -1)
    _, _, axes = np.linalg.svd((pixels - pixels.mean(axis=1, keepdims=True)).T.astype(np.float64), full_matrices=False)
    rows = codec.projection_KC / np.linalg.norm(codec.projection_KC, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs((rows * axes[: len(rows)]).sum(axis=1)), 1, atol=1e-4)


def test_what_never_varies_cannot_be_fitted() -> None:
    accumulator = StatisticsAccumulator(3)
    accumulator.add(np.ones((2, 3, 4, 4)), np.ones((5, 3)))
    with pytest.raises(CacheError, match="do not vary"):
        Logit.fit(accumulator.statistics(), relative_step=1 / 64, identity_share=0.01)


def pca_int8(num_kept: int, maps: NDArray[np.float32]) -> NDArray[Any]:
    """Plain principal components, 8 bits each, fitted on the same sample."""
    pixels = np.concatenate([features(seed) for seed in range(3)]).transpose(1, 0, 2, 3).reshape(NUM_CHANNELS, -1)
    mean = pixels.mean(axis=1)[:, None, None]
    axes = np.linalg.svd((pixels.T - pixels.mean(axis=1)).astype(np.float64), full_matrices=False)[2][:num_kept]
    step = np.abs(axes @ (pixels - pixels.mean(axis=1, keepdims=True))).max(axis=1)[:, None, None] / 127
    rounded = np.rint(np.einsum("kc,tchw->tkhw", axes, maps - mean) / step)
    return np.einsum("kc,tkhw->tchw", axes, rounded * step) + mean


def per_channel(levels: float, maps: NDArray[np.float32]) -> NDArray[Any]:
    """Every channel in its own range, rounded to so many levels from zero up."""
    step = maps.max(axis=(0, 2, 3))[:, None, None] / (levels - 1)
    return np.rint(maps / step) * step


def test_logit_beats_principal_components_and_fewer_bits_at_equal_bytes() -> None:
    maps, vectors = features(11), embeddings(11)
    codec = Logit.fit(statistics(), relative_step=1 / 16, identity_share=1e-4)
    bytes_a_pixel = codec.stored_channels(NUM_CHANNELS)
    assert SEEN <= bytes_a_pixel <= NUM_CHANNELS // 2
    competitors = {
        "logit": codec.decode(codec.encode(maps)),
        "components": pca_int8(bytes_a_pixel, maps),
        "bits": per_channel(2.0 ** (8 * bytes_a_pixel / NUM_CHANNELS), maps),
    }
    errors = {name: np.einsum("nc,tchw->nthw", vectors, m - maps).std() for name, m in competitors.items()}
    assert errors["logit"] < errors["components"] / 4
    assert errors["logit"] < errors["bits"] / 2


# The fold


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), leading=st.sampled_from([(), (3,), (2, 5)]))
def test_fold_is_the_dot_product_with_decoded_features(
    codecs: dict[str, Codec], name: str, seed: int, leading: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    codec = codecs[name]
    channels = codec.stored_channels(NUM_CHANNELS)
    if codec.dtype.kind == "f":
        stored = (rng.standard_normal((2, channels, 3, 4)) * 10).astype(codec.dtype)
    else:
        stored = rng.integers(-127, 128, (2, channels, 3, 4)).astype(codec.dtype)
    maps_TKHW = stored if codec.planes is None else codec.planes.expand(stored)
    vectors = rng.standard_normal((*leading, NUM_CHANNELS)).astype(np.float32)
    folded, constant = codec.fold(vectors)
    assert folded.shape == (*leading, maps_TKHW.shape[1])
    assert constant is None or constant.shape == leading
    logits = np.einsum("...r,trhw->...thw", folded.astype(np.float64), maps_TKHW.astype(np.float64))
    logits += 0 if constant is None else np.asarray(constant)[..., None, None, None]
    decoded = codec.decode(stored).astype(np.float64)
    expected = np.einsum("...c,tchw->...thw", vectors.astype(np.float64), decoded)
    size = np.einsum("...c,tchw->...thw", np.abs(vectors), np.abs(decoded)).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize("name", NAMES)
def test_training_reads_the_same_matrix_off_the_fold(codecs: dict[str, Codec], name: str) -> None:
    from train_head.build import decoding_of

    codec, maps = codecs[name], features(2)
    stored = codec.encode(maps)
    decoding = decoding_of(codec, NUM_CHANNELS)
    decoded = decoding.expand(torch.from_numpy(stored), maps.shape[2:]).float().numpy()
    if decoding.matrix_CR is not None:
        decoded = np.einsum("cr,trhw->tchw", decoding.matrix_CR.numpy(), decoded)
    if decoding.mean_C is not None:
        decoded = decoded + decoding.mean_C.numpy()[:, None, None]
    np.testing.assert_allclose(decoded, codec.decode(stored, maps.shape[2:]), atol=1e-4)
