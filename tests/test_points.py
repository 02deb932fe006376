"""Random points and what they read, against PointRend's numbers and dense sampling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_head_parity import GOLDEN
from train_head.heads.mask_folding import MaskWeights
from train_head.losses import frame_sums
from train_head.losses.frame_sums import add_up, many_point_sums, point_sums
from train_head.losses.points import (
    LossPoints,
    PointConfig,
    RandomPoints,
    choose_uncertain,
    sample_map,
    sample_masks,
)
from train_head.losses.selection import smallest


def sample_logits(logits_GHW: Tensor, points_GP2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """By PyTorch's own sampling, each map at its own points: (G, P)."""
    H, W = logits_GHW.shape[-2:]
    scale = torch.tensor((area_hw[1] / (4 * W), area_hw[0] / (4 * H)), device=points_GP2.device)
    grid = points_GP2[:, None] * scale * 2 - 1
    return F.grid_sample(logits_GHW[:, None], grid, align_corners=False)[:, 0, 0]


def assert_uncertain_points(device: torch.device) -> None:
    """PointRend's choice, from candidates that are each mask's own."""
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "uncertain_points.npz").items()}
    area_hw = (4 * golden["logits"].shape[-2], 4 * golden["logits"].shape[-1])
    points_GS2 = torch.cat([golden["rand_first"], golden["rand_second"]], dim=1).to(device)
    logits_GS = sample_logits(golden["logits"][:, 0].to(device), points_GS2, area_hw)
    index_GP = choose_uncertain(logits_GS, golden["rand_first"].shape[1], keep=84)
    points = points_GS2.gather(1, index_GP[..., None].expand(-1, -1, 2)).cpu()
    assert torch.equal(points[:, 84:], golden["point_coords"][:, 84:])
    for ours, theirs in zip(points, golden["point_coords"], strict=True):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_uncertain_points() -> None:
    assert_uncertain_points(torch.device("cpu"))


def test_random_points_depend_on_seed_and_clip_only() -> None:
    config = PointConfig(matching=9, loss=8)
    device = torch.device("cpu")
    first, again, other = (RandomPoints.for_clip(config, 3, s, device) for s in (7, 7, 8))
    drawn = first.matching_points(device)
    assert drawn.shape == (9, 2) and torch.equal(drawn, again.matching_points(device))
    points = [source.loss_points(2, device) for source in (first, again)]
    assert points[0].points_GS2.shape == (2, 24 + 2, 2) and torch.equal(points[0].points_GS2, points[1].points_GS2)
    assert (points[0].num_candidates, points[0].keep) == (24, 6)
    assert not torch.equal(drawn, other.matching_points(device))


def test_points_of_maps_and_masks_equal_dense_sampling() -> None:
    """A map over the image and two more rows, masks of the image alone: as if all were padded floats."""
    generator = torch.Generator().manual_seed(1)
    map_TRHW = torch.randn(2, 3, 8, 8, generator=generator)  # a canvas of 32 × 32 pixels
    masks_Ghw = torch.rand(4, 21, 30, generator=generator) > 0.5
    points_TP2 = torch.rand(2, 50, 2, generator=generator)
    image_scale = torch.tensor((30 / 32, 21 / 32))
    grid = (points_TP2 * image_scale)[:, None] * 2 - 1
    expected_TRP = F.grid_sample(map_TRHW, grid, align_corners=False)[:, :, 0]
    cut = torch.stack([*sample_map(map_TRHW[:, :, :7], points_TP2, (21, 30))])  # ceil(21 / 4) rows and one more
    torch.testing.assert_close(cut[..., :3], expected_TRP.transpose(1, 2), atol=1e-5, rtol=1e-5)
    padded = F.pad(masks_Ghw[2:].float(), (0, 2, 0, 11))[:, None]
    expected_SP = F.grid_sample(padded, grid, align_corners=False)[:, 0, 0]
    actual_SP = sample_masks(masks_Ghw, torch.tensor([2, 3]), points_TP2, (21, 30))
    torch.testing.assert_close(actual_SP, expected_SP, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masks_at_once", [2, 96])
@pytest.mark.parametrize(("area_hw", "keep"), [((28, 32), 0), ((28, 32), 12), ((21, 30), 12), ((40, 44), 0)])
def test_sums_through_dense_logits(
    area_hw: tuple[int, int], keep: int, masks_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against grid_sample and autograd in float64: sums, and gradients of weights and of the map.

    The area is the map, less (an image on a padded canvas), or more (where logits are 0, and choosing is arbitrary).
    """
    monkeypatch.setattr(frame_sums, "_MASKS_AT_ONCE", masks_at_once)
    generator = torch.Generator().manual_seed(3)
    exact = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (5,), (3, 7, 8))]
    ours = [tensor.float().requires_grad_() for tensor in exact]
    weights_GR, const_G, map_RHW = (tensor.requires_grad_() for tensor in exact)
    points = LossPoints(points_GS2=torch.rand(2, 90, 2, generator=generator), num_candidates=60, keep=keep)
    labels_NS, object_G = torch.rand(3, 90, generator=generator), torch.tensor([2, 0, 0, 1, 2])
    logits_GHW = torch.einsum("gr,rhw->ghw", weights_GR, map_RHW) + const_G[:, None, None]
    logits_GS = sample_logits(logits_GHW, points.points_GS2[1, None].double().expand(5, -1, -1), area_hw)
    kept_GK = logits_GS[:, :60].abs().argsort(dim=1)[:, :keep]
    index_GP = torch.cat([kept_GK, torch.arange(60, 90).expand(5, -1)], dim=1)
    expected_3G = point_sums(logits_GS.gather(1, index_GP), labels_NS.double()[object_G].gather(1, index_GP))
    folded = MaskWeights(weights_R=ours[0], const=ours[1])
    sums_3G = many_point_sums(folded, ours[2], labels_NS, object_G, points, 1, area_hw)
    torch.testing.assert_close(sums_3G.double(), expected_3G, rtol=1e-5, atol=1e-5)
    gradient_3G = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    expected_3G.backward(gradient_3G)
    sums_3G.backward(gradient_3G.float())
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_pixels", [20, 1 << 17])
def test_gradients_are_added_up_at_pixels(num_pixels: int) -> None:
    """More pixels than 2 bytes can number, too; pixels without any point stay zero."""
    generator = torch.Generator().manual_seed(4)
    gradient_GS, share_S4 = torch.randn(3, 50, generator=generator), torch.rand(50, 4, generator=generator)
    index_S4 = torch.randint(num_pixels, (50, 4), generator=generator)
    index_S4[0] = torch.tensor([0, 0, num_pixels - 1, num_pixels - 1])
    expected_NG = torch.zeros(num_pixels, 3)
    for corner in range(4):
        expected_NG.index_add_(0, index_S4[:, corner], gradient_GS.t() * share_S4[:, corner, None])
    torch.testing.assert_close(add_up(gradient_GS, index_S4, share_S4, num_pixels), expected_NG)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("num_masks", [0, 1])
def test_a_frame_of_none_or_one_on_several_threads(num_masks: int) -> None:
    weights = MaskWeights(
        weights_R=torch.randn(num_masks, 8, requires_grad=True), const=torch.zeros(num_masks, requires_grad=True)
    )
    points = LossPoints(points_GS2=torch.rand(1, 1664, 2), num_candidates=1536, keep=384)
    labels_NS, object_G = torch.rand(num_masks, 1664), torch.zeros(num_masks, dtype=torch.int64)
    sums_3G = many_point_sums(weights, torch.randn(8, 24, 40), labels_NS, object_G, points, 0, (96, 160))
    assert sums_3G.shape == (3, num_masks)
    sums_3G.sum().backward()
    for leaf in (weights.weights_R, weights.const):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


SORTED = np.arange(40_000, dtype=np.float32)
ROWS = {
    "random": np.random.default_rng(0).exponential(size=40_000),
    "ties": np.random.default_rng(1).integers(0, 5, 40_000),
    "equal": np.ones(40_000),
    "sorted": SORTED,
    "a sample that misleads": np.where(SORTED % 39 == 0, 1e6 + SORTED, SORTED),
    "NaN": np.where(SORTED % 2 == 0, np.nan, SORTED),
}


@pytest.mark.parametrize("count", [1, 7, 9_408, 20_000, 39_999, 40_000])
@pytest.mark.parametrize("name", ROWS)
def test_the_smallest_of_a_row(name: str, count: int) -> None:
    values_GS = np.stack([ROWS[name], ROWS["random"]]).astype(np.float32)
    chosen_GK = smallest(values_GS, count)
    assert chosen_GK.shape == (2, count)
    for values_S, chosen_K in zip(values_GS, chosen_GK, strict=True):
        assert len(set(chosen_K.tolist())) == count
        np.testing.assert_array_equal(np.sort(values_S[chosen_K]), np.sort(values_S)[:count])
