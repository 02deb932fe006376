"""Properties of matching and losses: against literal definitions, for any clip sizes and object counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cache.errors import AnnotationError
from tests.test_head_parity import golden_head
from tests.test_losses_parity import FixedPoints, step
from train_head.losses.criterion import LossNormalisers, LossWeights, VitaCriterion
from train_head.losses.matcher import CostWeights, assign, point_costs
from train_head.losses.points import PointConfig, RandomPoints
from train_head.losses.similarity import num_similarity_pairs
from train_head.losses.targets import ClipTargets, clip_targets


def test_point_costs_equal_the_pairwise_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    weights, channels = (
        torch.randn(4, 3, generator=generator),
        9 * torch.randn(3, 260, generator=generator),
    )
    targets = torch.rand(2, 260, generator=generator)
    frames = channels.t().unflatten(0, (2, 130))
    costs = point_costs(weights, frames, targets.unflatten(1, (2, 130)), CostWeights(mask=5.0, dice=5.0))
    logits = weights @ channels
    for query, x in enumerate(logits):
        for column, t in enumerate(targets):
            p = x.sigmoid()
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            expected = 5 * F.binary_cross_entropy_with_logits(x, t) + 5 * dice
            assert float(costs[query, column]) == pytest.approx(float(expected), rel=1e-5)


def test_logits_in_half_precision_move_costs_by_their_rounding() -> None:
    """bfloat16 has 8 bits: of costs up to 40, means over all points, nothing but the third digit may change."""
    generator = torch.Generator().manual_seed(4)
    weights, frames = torch.randn(20, 65, generator=generator), torch.randn(2, 400, 65, generator=generator)
    targets = (torch.rand(3, 2, 400, generator=generator) > 0.5).float()
    exact = point_costs(weights, frames, targets, CostWeights())
    half = point_costs(weights, frames, targets, CostWeights(), torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=2e-3, atol=2e-3)


def test_assignment_is_optimal_and_refuses_nan() -> None:
    costs = [np.random.default_rng(3).random(shape) for shape in ((2, 4, 2), (2, 2, 3), (2, 4, 0))]
    for cost, (rows, columns) in zip(costs, assign(costs), strict=True):
        for problem, row, column in zip(cost, rows, columns, strict=True):
            V, N = problem.shape
            best = (
                min(sum(problem[v, n] for n, v in enumerate(p)) for p in permutations(range(V), N))
                if V >= N
                else min(sum(problem[v, n] for v, n in enumerate(p)) for p in permutations(range(N), V))
            )
            assert len(row) == min(V, N) and float(problem[row, column].sum()) == pytest.approx(float(best))
    with pytest.raises(FloatingPointError, match="clip 1"):
        assign([costs[0], np.full((1, 2, 2), np.nan)])


def random_clip(generator: torch.Generator, num_objects: int, num_frames: int, hw: tuple[int, int]) -> ClipTargets:
    masks = torch.rand(num_objects, num_frames, *hw, generator=generator) > 0.4
    target = clip_targets(torch.randint(0, 5, (num_objects,), generator=generator), torch.arange(num_objects), masks)
    queries = torch.randint(0, 20, (3, num_frames, num_objects), generator=generator)
    return replace(target, frame_queries_LTN=queries)


@pytest.mark.parametrize("num_objects", [3, 18])
def test_mask_losses_equal_a_loop_over_matched_pairs(num_objects: int) -> None:
    """Fewer and more objects than the 15 queries, on a map that stops one row and column after the image."""
    generator = torch.Generator().manual_seed(8)
    head = golden_head()
    target = random_clip(generator, num_objects, 2, (21, 30))
    map_TRHW = torch.rand(2, 64, 7, 9, generator=generator)
    points = FixedPoints(torch.rand(40, 2, generator=generator))
    queries_LBTQC = torch.randn(3, 1, 2, 20, 64, generator=generator)
    with torch.no_grad():
        losses = step(head, queries_LBTQC, [map_TRHW], [target], points, VitaCriterion())
        embed_DLVC = head(queries_LBTQC).mask_embed_DLBVC[:, :, 0]
        convolved = head.vita_mask_features(map_TRHW)
    grid = points.points_P2[None, None] * torch.tensor((30 / 36, 21 / 28)) * 2 - 1
    expected_mask, expected_dice = torch.zeros(6), torch.zeros(6)
    for depth, layer in np.ndindex(6, 3):
        match = losses.matches[0]
        for query, chosen in zip(match.query_DLM[depth, layer], match.object_DLM[depth, layer], strict=True):
            logits_THW = torch.einsum("c,tchw->thw", embed_DLVC[depth, layer, query], convolved)
            canvas_Thw = F.pad(target.masks_NThw[chosen].float(), (0, 6, 0, 7))
            x = F.grid_sample(logits_THW[:, None], grid.expand(2, -1, -1, -1), align_corners=False).flatten()
            t = F.grid_sample(canvas_Thw[:, None], grid.expand(2, -1, -1, -1), align_corners=False).flatten()
            p = x.sigmoid()
            expected_mask[depth] += F.binary_cross_entropy_with_logits(x, t) / (3 * num_objects)
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            expected_dice[depth] += dice / (3 * num_objects)
    torch.testing.assert_close(losses.mask_D, expected_mask, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.dice_D, expected_dice, rtol=1e-4, atol=1e-4)


def test_a_batch_equals_its_clips_one_by_one() -> None:
    """Clips of different sizes, one empty, one with more objects than queries (18 > 15)."""
    generator = torch.Generator().manual_seed(4)
    head = golden_head()
    sizes = [((24, 32), 2), ((21, 30), 0), ((17, 40), 18)]
    targets = [random_clip(generator, count, 2, hw) for hw, count in sizes]
    maps = [torch.rand(2, 64, h // 4 + 2, w // 4 + 2, generator=generator) for (h, w), _ in sizes]
    queries_LBTQC = torch.randn(3, 3, 2, 20, 64, generator=generator)
    points = FixedPoints(torch.rand(40, 2, generator=generator))
    criterion = VitaCriterion()
    with torch.no_grad():
        batch = step(head, queries_LBTQC, maps, targets, points, criterion)
        single = [step(head, queries_LBTQC[:, [b]], [maps[b]], [targets[b]], points, criterion) for b in range(3)]
    norm = [LossNormalisers.of_batch([target], 3, 15) for target in targets]
    whole = LossNormalisers.of_batch(targets, 3, 15)
    for ours, alone in zip(batch.matches, (losses.matches[0] for losses in single), strict=True):
        assert torch.equal(ours.query_DLM, alone.query_DLM) and torch.equal(ours.object_DLM, alone.object_DLM)
    for name in ("class_D", "mask_D", "dice_D", "similarity"):
        divisor = {"class_D": "class_weight", "similarity": "similarity_pairs"}.get(name, "num_masks")
        sums = [getattr(one, name) * getattr(n, divisor) for one, n in zip(single, norm, strict=True)]
        torch.testing.assert_close(getattr(batch, name) * getattr(whole, divisor), sum(sums), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_frames", "num_objects"), [(1, 2), (2, 0), (1, 18)])
def test_legal_extremes_have_finite_losses_and_gradients(num_frames: int, num_objects: int) -> None:
    generator = torch.Generator().manual_seed(5)
    head = golden_head()
    target = random_clip(generator, num_objects, num_frames, (20, 20))
    map_TRHW = torch.rand(num_frames, 64, 6, 6, generator=generator)
    points = RandomPoints(PointConfig(matching=30, loss=16), generator)
    queries_LBTQC = torch.randn(3, 1, num_frames, 20, 64, generator=generator)
    losses = step(head, queries_LBTQC, [map_TRHW], [target], points, VitaCriterion())
    losses.total.backward()
    assert losses.matches[0].query_DLM.shape == (6, 3, min(15, num_objects))
    assert float(losses.mask_D.detach().sum()) == 0.0 or num_objects > 0
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_missing_frame_matches_and_mixed_clips_are_refused() -> None:
    generator = torch.Generator().manual_seed(6)
    target = random_clip(generator, 2, 2, (20, 20))
    points = RandomPoints(PointConfig(matching=30, loss=16), generator)
    inputs = (
        torch.randn(3, 1, 2, 20, 64),
        [torch.rand(2, 64, 6, 6)],
        [replace(target, frame_queries_LTN=None)],
    )
    with pytest.raises(AnnotationError, match=r"loss\.sim_weight=0"):
        step(golden_head(), *inputs, points, VitaCriterion(weights=LossWeights()))
    with pytest.raises(AnnotationError, match="2 objects in 2 frames"):
        replace(target, labels_N=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("num_queries", "num_objects", "matched"), [(4, 3, 3), (4, 7, 4)])
def test_pairs_of_similarity_count_as_many_video_queries_as_can_be_matched(
    num_queries: int, num_objects: int, matched: int
) -> None:
    queries_LTN = torch.full((2, 3, num_objects), -1)
    queries_LTN[0, 0, :2] = 1  # two embeddings of frames in the first layer
    queries_LTN[1, :, 0] = 2  # three in the second
    target = SimpleNamespace(frame_queries_LTN=queries_LTN, num_objects=num_objects)
    pairs = num_similarity_pairs([target, target], num_queries)  # type: ignore[list-item]
    assert float(pairs) == pytest.approx(2 * ((2 + matched) ** 2 + (3 + matched) ** 2))
