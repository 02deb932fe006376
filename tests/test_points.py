"""Random points and what they read, against PointRend's numbers and dense sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tests.test_head_parity import GOLDEN
from train_head.losses.batch_losses import choose_uncertain
from train_head.losses.points import (
    PointConfig,
    RandomPoints,
    choose_points,
    keep_uncertain,
    sample_logits,
    sample_map,
    sample_masks,
)


def test_uncertain_points() -> None:
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "uncertain_points.npz").items()}
    H, W = golden["logits"].shape[-2:]
    chosen = keep_uncertain(
        golden["logits"][:, 0], golden["rand_first"], golden["rand_second"], (4 * H, 4 * W), keep=84
    )
    points_GS2 = torch.cat([golden["rand_first"], golden["rand_second"]], dim=1)
    logits_GS = sample_logits(golden["logits"][:, 0], points_GS2, (4 * H, 4 * W))
    index_GP = choose_uncertain(logits_GS, golden["rand_first"].shape[1], keep=84)
    for points in (chosen, points_GS2.gather(1, index_GP[..., None].expand(-1, -1, 2))):
        assert torch.equal(points[:, 84:], golden["point_coords"][:, 84:])
        for ours, theirs in zip(points, golden["point_coords"], strict=True):
            assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_random_points_depend_on_seed_and_clip_only() -> None:
    config = PointConfig(matching=9, loss=8)
    logits = torch.zeros(2, 4, 4)
    first, again, other = (RandomPoints.for_clip(config, 3, s, torch.device("cpu")) for s in (7, 7, 8))
    drawn = first.matching_points(logits.device)
    assert drawn.shape == (9, 2) and torch.equal(drawn, again.matching_points(logits.device))
    chosen = [choose_points(logits, source.loss_points(2, logits.device), 1, (16, 16)) for source in (first, again)]
    assert chosen[0].shape == (2, 8, 2) and torch.equal(*chosen)
    assert not torch.equal(drawn, other.matching_points(logits.device))


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
