"""The spectral codec against SciPy's cosine transform, and against the logit codec, whose basis it shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.fft import dctn

from cache.codecs.blocks import BLOCK, FREQUENCIES, Planes, block_grid, from_blocks, to_blocks
from cache.codecs.fit import StatisticsAccumulator
from cache.codecs.logit import Logit
from cache.codecs.spectral import Spectral
from cache.errors import CacheError
from cache.storage.compression import compress
from tests.codec_samples import NUM_CHANNELS, embeddings, features, mixing, statistics
from train_head.heads.map_planes import MapPlanes

STEP = 1 / 64


def cosine_coefficients(maps_KHW: NDArray[Any]) -> NDArray[np.float64]:
    """(K, H, W) -> (K, F, h·w), block by block."""
    K, H, W = maps_KHW.shape
    h, w = block_grid((H, W), BLOCK)
    padded = np.pad(maps_KHW.astype(np.float64), ((0, 0), (0, h * BLOCK - H), (0, w * BLOCK - W)), mode="edge")
    blocks = [
        dctn(padded[:, y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK], axes=(1, 2), norm="ortho")
        for y in range(h)
        for x in range(w)
    ]
    return np.stack(blocks, axis=-1).reshape(K, FREQUENCIES, h * w)


def smooth_features(seed: int, num_frames: int = 4) -> NDArray[np.float32]:
    """(T, C, 45, 60): features at a third of the resolution, up-sampled."""
    coarse = torch.from_numpy(features(seed, num_frames))
    return torch.nn.functional.interpolate(coarse, (45, 60), mode="bilinear").numpy()


def smooth_statistics() -> Any:
    accumulator = StatisticsAccumulator(NUM_CHANNELS)
    for seed in range(3):
        accumulator.add(smooth_features(seed), embeddings(seed))
    return accumulator.statistics()


# Blocks


@pytest.mark.parametrize("map_hw", [(8, 16), (14, 18), (7, 3), (91, 160)])
def test_blocks_are_scipys(map_hw: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).standard_normal((3, *map_hw))
    coefficients_KFS = to_blocks(maps)
    np.testing.assert_allclose(coefficients_KFS, cosine_coefficients(maps), atol=1e-12)
    np.testing.assert_allclose(from_blocks(coefficients_KFS, map_hw), maps, atol=1e-12)
    some = np.array([0, 9, 63])
    np.testing.assert_allclose(to_blocks(maps, some), coefficients_KFS[:, some], atol=1e-12)


def test_planes_worked_by_hand() -> None:
    """A wide constant of channel 1 and the first horizontal wave of channel 0, in two blocks."""
    planes = Planes(number_N=np.array([64, 1]), num_wide=1, num_channels=2)
    stored = np.array([[[8, 0]], [[4, -4]], [[1, 0]]], np.int8)  # 8 + 256 in the first block; ±4; the high digit
    maps = planes.expand(stored[None])[0]
    wave = np.sqrt(2 / 8) * np.cos(np.pi * (2 * np.arange(8) + 1) / 16) * np.sqrt(1 / 8)
    np.testing.assert_allclose(maps[1], np.repeat([[33.0, 0.0]], 8, axis=1).repeat(8, axis=0), atol=1e-5)
    np.testing.assert_allclose(maps[0], np.tile(np.concatenate([4 * wave, -4 * wave]), (8, 1)), atol=1e-6)
    cut = planes.expand(stored[None], (5, 11))[0]
    np.testing.assert_array_equal(cut, maps[:, :5, :11])


@pytest.mark.parametrize("at_once", [False, True])
def test_on_the_device_planes_expand_to_the_same(at_once: bool) -> None:
    rng = np.random.default_rng(0)
    number_N = rng.permutation(40 * FREQUENCIES)[:700]  # some channels have many planes, the last may have none
    planes = Planes(number_N=number_N, num_wide=50, num_channels=41)
    stored = rng.integers(-127, 128, (3, 750, 3, 4)).astype(np.int8)
    expected = planes.expand(stored, (21, 30))
    on_device = MapPlanes.on(torch.device("cpu"), planes, at_once=at_once)
    found = on_device.expand(torch.from_numpy(stored), (21, 30))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("at_once", [False, True])
def test_channels_without_planes_may_fill_a_group(at_once: bool) -> None:
    planes = Planes(number_N=np.array([0, 64, 20 * FREQUENCIES]), num_wide=0, num_channels=40)
    stored = np.random.default_rng(0).integers(-127, 128, (2, 3, 3, 4)).astype(np.int8)
    found = MapPlanes.on(torch.device("cpu"), planes, at_once=at_once).expand(torch.from_numpy(stored), (21, 30))
    np.testing.assert_allclose(found.numpy(), planes.expand(stored, (21, 30)), rtol=1e-5, atol=1e-5)


# Fitting


def test_streamed_moments_of_frequencies() -> None:
    maps = np.concatenate([features(seed) for seed in range(3)]).astype(np.float64)
    mean = maps.mean(axis=(0, 2, 3))[:, None, None]
    coefficients = np.concatenate([cosine_coefficients(frame - mean) for frame in maps], axis=2)
    expected = np.einsum("cfs,dfs->fcd", coefficients, coefficients) / coefficients.shape[2]
    np.testing.assert_allclose(statistics().frequency_moment_FCC, expected, rtol=1e-9, atol=1e-9 * expected.max())


def test_planes_of_less_than_half_a_step_drop_out_and_the_strongest_come_first() -> None:
    """White channels, whose every frequency has the variance of the channel."""
    rng = np.random.default_rng(0)
    deviation = np.array([40.0, 2.0, 0.6, 0.4])
    accumulator = StatisticsAccumulator(4)
    accumulator.add(rng.standard_normal((40, 4, 40, 40)) * deviation[:, None, None], np.eye(4) * 2)
    found = accumulator.statistics()
    codec = Spectral.fit(found, relative_step=1 / found.logit_std, identity_share=0.5)  # the step is 1
    assert codec.stored_channels(4) == 3 * 64 + 64 and codec.num_wide == 64
    channel_N, frequency_N = np.divmod(codec.planes.number_N, FREQUENCIES)
    assert channel_N.tolist() == [0] * 64 + [1] * 64 + [2] * 64
    assert set(frequency_N[:64].tolist()) == set(range(64))
    assert np.abs(codec.projection_KC).argmax(axis=1).tolist() == [0, 1, 2]


def test_what_never_varies_cannot_be_fitted() -> None:
    accumulator = StatisticsAccumulator(3)
    accumulator.add(np.ones((2, 3, 4, 4)), np.ones((5, 3)))
    with pytest.raises(CacheError, match="do not vary"):
        Spectral.fit(accumulator.statistics(), relative_step=STEP, identity_share=0.01)


# Encoding


@pytest.mark.parametrize("most_are_kept", [False, True])
@pytest.mark.parametrize("repeated", [1, 64])  # few blocks, and many
def test_every_kept_plane_is_rounded_to_half_a_step(most_are_kept: bool, repeated: int) -> None:
    fitted, step = (statistics(), STEP) if most_are_kept else (smooth_statistics(), 4 * STEP)
    codec = Spectral.fit(fitted, relative_step=step, identity_share=0.01)
    maps = np.tile(features(7)[:, :, :8, :16], (1, 1, 1, repeated))
    assert (len(codec.plane_N) > len(codec.projection_KC) * FREQUENCIES / 2) == most_are_kept
    channels = np.einsum("kc,tchw->tkhw", codec.projection_KC, maps - codec.mean_C[:, None, None])
    for stored_Rhw, channels_KHW in zip(codec.encode(maps), channels, strict=True):
        wanted_NS = cosine_coefficients(channels_KHW).reshape(-1, 2 * repeated)[codec.planes.number_N]
        found_NS = stored_Rhw[: len(wanted_NS)].reshape(wanted_NS.shape).astype(float)
        found_NS[: codec.num_wide] += 256.0 * stored_Rhw[len(wanted_NS) :].reshape(-1, 2 * repeated)
        assert codec.num_wide > 0 and np.abs(found_NS - wanted_NS).max() <= 0.501


def test_it_saturates_instead_of_wrapping() -> None:
    codec = Spectral.fit(statistics(), relative_step=STEP, identity_share=0.01)
    constant_C = mixing() @ np.full(NUM_CHANNELS, 3e3)
    stored_RS = codec.encode(constant_C[None, :, None, None].repeat(8, 2).repeat(8, 3))[0].reshape(-1)
    true_K = 8 * codec.projection_KC @ (constant_C - codec.mean_C)
    channel_N, frequency_N = np.divmod(codec.planes.number_N, FREQUENCIES)
    most_N = np.where(np.arange(len(channel_N)) < codec.num_wide, 127 * 256 + 127, 127)
    value_N = stored_RS[: len(channel_N)].astype(float)
    value_N[: codec.num_wide] += 256.0 * stored_RS[len(channel_N) :]
    whole = frequency_N == 0
    expected_N = np.clip(true_K[channel_N], -most_N, most_N)[whole]
    np.testing.assert_allclose(value_N[whole], expected_N, atol=0.6)
    assert set(np.abs(expected_N[np.abs(true_K[channel_N][whole]) > most_N[whole]])) == {127.0, 32639.0}


def test_two_thirds_of_logits_bytes_at_a_smaller_error_on_smooth_maps() -> None:
    found, maps, vectors = smooth_statistics(), smooth_features(11), embeddings(11)
    sizes, errors = {}, {}
    for codec in (kind.fit(found, relative_step=STEP, identity_share=0.1) for kind in (Logit, Spectral)):
        stored = codec.encode(maps)
        sizes[codec.name] = sum(len(compress(frame)) for frame in stored)
        decoded = codec.decode(stored, maps.shape[2:])
        errors[codec.name] = float(np.einsum("nc,tchw->nthw", vectors, decoded - maps).std())
    assert sizes["spectral"] < sizes["logit"] * 2 / 3
    assert errors["spectral"] <= errors["logit"]
