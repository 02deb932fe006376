"""Matching, losses, gradients and targets against the original VITA's numbers (tests/golden/vita_head)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import AnnotationError
from tests.test_head_parity import GOLDEN, golden_head
from train_head.criterion import LossNormalisers, LossWeights, VitaCriterion, VitaLosses
from train_head.head import VitaHead
from train_head.mask_folding import MapDecoding
from train_head.matcher import CostWeights, assign, point_costs
from train_head.points import PointConfig, RandomPoints, keep_uncertain, sample_map, sample_masks
from train_head.targets import ClipTargets, clip_targets

Recorded = tuple[VitaHead, Tensor, Tensor, VitaLosses]
EXPECTED = json.loads((GOLDEN / "losses.json").read_text())


@dataclass(frozen=True)
class FixedPoints:
    """The same points for every clip, mask and frame, as in the recording."""

    points_P2: Tensor

    def matching_points(self, device: torch.device) -> Tensor:
        return self.points_P2.to(device)

    def loss_points(self, logits_GHW: Tensor, area_hw: tuple[int, int]) -> Tensor:
        return self.points_P2.expand(len(logits_GHW), -1, -1)


def unpack(bits: np.ndarray, width: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, axis=-1)[..., :width])


def golden_targets() -> list[ClipTargets]:
    golden = np.load(GOLDEN / "targets.npz")
    result = []
    for clip in range(2):
        masks_TNhw = unpack(golden[f"in{clip}_masks"], int(golden[f"in{clip}_size"][1]))
        labels_N = torch.from_numpy(golden[f"in{clip}_classes"]).amax(dim=0)
        identities_N = torch.from_numpy(golden[f"in{clip}_ids"]).amax(dim=0)
        target = clip_targets(labels_N, identities_N, masks_TNhw.transpose(0, 1).contiguous())
        result.append(replace(target, frame_queries_LTN=golden_frame_queries(target, clip)))
    return result


def golden_frame_queries(target: ClipTargets, clip: int) -> Tensor:
    """The recorded frame-level matches, which number a frame's objects among those present in it."""
    N, T = target.present_NT.shape
    queries_LTN = torch.full((3, T, N), -1)
    for layer in range(3):
        for frame in range(T):
            present = target.present_NT[:, frame].nonzero().flatten()
            queries, objects = EXPECTED["fg_indices"][layer][clip * T + frame]
            queries_LTN[layer, frame, present[objects]] = torch.tensor(queries)
    return queries_LTN


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    """Forward, losses and backward of the recorded step."""
    golden = np.load(GOLDEN / "train.npz")
    head = golden_head()
    queries = torch.from_numpy(golden["frame_queries"]).requires_grad_()
    maps = torch.from_numpy(golden["raw_mask_features"]).requires_grad_()
    points = FixedPoints(torch.from_numpy(np.load(GOLDEN / "targets.npz")["points"]))
    losses = step(
        head,
        queries.unflatten(1, (2, 5)),
        maps.unflatten(0, (2, 5)).unbind(),
        golden_targets(),
        points,
        VitaCriterion(padded_area="background"),
    )
    losses.total.backward()
    return head, queries, maps, losses


def step(
    head: VitaHead,
    queries_LBTQC: Tensor,
    maps: Sequence[Tensor],
    targets: Sequence[ClipTargets],
    points: FixedPoints | RandomPoints,
    criterion: VitaCriterion,
) -> VitaLosses:
    outputs = head(queries_LBTQC, shift=False)
    weights = head.fold_masks(outputs.mask_embed_DLBVC, MapDecoding())
    normalisers = LossNormalisers.of_batch(targets, queries_LBTQC.shape[0], head.config.num_queries)
    return criterion(outputs, weights, maps, targets, points, normalisers)


def test_every_loss_term(recorded: Recorded) -> None:
    losses = recorded[3]
    named = {name: float(value.detach()) for name, value in losses.named().items()}
    assert named == pytest.approx(EXPECTED["losses_unweighted"], rel=1e-4)
    assert float(losses.total.detach()) == pytest.approx(EXPECTED["total"], rel=1e-4)


def test_every_matching(recorded: Recorded) -> None:
    for depth, expected in enumerate([*EXPECTED["matcher_aux"], EXPECTED["matcher_final"]]):
        for problem, (queries, objects) in enumerate(expected):
            match = recorded[3].matches[problem % 2]
            assert match.query_DLM[depth, problem // 2].tolist() == queries
            assert match.object_DLM[depth, problem // 2].tolist() == objects


def test_gradient_of_every_parameter(recorded: Recorded) -> None:
    parameters = dict(recorded[0].named_parameters(prefix="vita_module"))
    assert parameters.keys() == EXPECTED["grad"].keys()
    for name, expected in EXPECTED["grad"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        norm = expected["norm"]
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-5), name
        # A sum or an entry may cancel to nearly nothing: its error is that of the whole gradient.
        assert float(gradient.sum()) == pytest.approx(expected["sum"], rel=1e-4, abs=1e-4 * norm + 1e-5), name
        assert gradient.flatten()[:4].tolist() == pytest.approx(
            expected["first"], rel=1e-4, abs=1e-4 * norm + 1e-6
        ), name


def test_gradient_of_the_inputs(recorded: Recorded) -> None:
    _, queries, maps, _ = recorded
    assert queries.grad is not None and maps.grad is not None
    expected = EXPECTED["grad_input"]
    assert float(queries.grad.norm()) == pytest.approx(expected["frame_queries"], rel=1e-4)
    assert float(maps.grad.norm()) == pytest.approx(expected["raw_mask_features"], rel=1e-4)
    layers = [float(layer.norm()) for layer in queries.grad]
    assert layers == pytest.approx(expected["frame_queries_per_layer"], rel=1e-4)


def test_target_preparation() -> None:
    golden = np.load(GOLDEN / "targets.npz")
    for clip, target in enumerate(golden_targets()):
        h, w = target.image_hw
        assert target.labels_N.tolist() == golden[f"clip{clip}_labels"].tolist()
        padded_NThw = unpack(golden[f"clip{clip}_masks"], 64)
        assert torch.equal(target.masks_NThw, padded_NThw[:, :, :h, :w])
        assert padded_NThw.sum() == target.masks_NThw.sum()
        shifted_N = target.identities_N - target.identities_N.min()
        identities_NT = torch.where(target.present_NT, shifted_N[:, None], -1)
        assert identities_NT.tolist() == golden[f"clip{clip}_ids"].tolist()
        for frame in range(5):
            present_N = target.present_NT[:, frame]
            assert target.labels_N[present_N].tolist() == golden[f"frame{clip * 5 + frame}_labels"].tolist()
            assert shifted_N[present_N].tolist() == golden[f"frame{clip * 5 + frame}_ids"].tolist()


def test_uncertain_points() -> None:
    golden = {
        name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "uncertain_points.npz").items()
    }
    H, W = golden["logits"].shape[-2:]
    chosen = keep_uncertain(
        golden["logits"][:, 0], golden["rand_first"], golden["rand_second"], (4 * H, 4 * W), keep=84
    )
    assert torch.equal(chosen[:, 84:], golden["point_coords"][:, 84:])
    for ours, theirs in zip(chosen, golden["point_coords"], strict=True):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_random_points_depend_on_seed_and_step_only() -> None:
    config = PointConfig(matching=9, loss=8)
    logits = torch.zeros(2, 4, 4)
    first, again, other = (RandomPoints.for_step(config, 3, s, torch.device("cpu")) for s in (7, 7, 8))
    drawn = first.matching_points(logits.device)
    assert drawn.shape == (9, 2) and torch.equal(drawn, again.matching_points(logits.device))
    assert torch.equal(first.loss_points(logits, (16, 16)), again.loss_points(logits, (16, 16)))
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
    cut = sample_map(map_TRHW[:, :, :7], points_TP2, (21, 30))  # ceil(21 / 4) rows and one more
    torch.testing.assert_close(cut[:, :3], expected_TRP, atol=1e-5, rtol=1e-5)
    padded = F.pad(masks_Ghw[2:].float(), (0, 2, 0, 11))[:, None]
    expected_SP = F.grid_sample(padded, grid, align_corners=False)[:, 0, 0]
    actual_SP = sample_masks(masks_Ghw, torch.tensor([2, 3]), points_TP2, (21, 30))
    torch.testing.assert_close(actual_SP, expected_SP, atol=1e-5, rtol=1e-5)


def test_point_costs_equal_the_pairwise_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    weights, channels = (
        torch.randn(1, 4, 3, generator=generator),
        9 * torch.randn(1, 3, 130, generator=generator),
    )
    targets = torch.rand(1, 2, 130, generator=generator)
    frames = channels.unflatten(2, (2, 65)).transpose(1, 2)
    costs = point_costs(weights, frames, targets.unflatten(2, (2, 65)), CostWeights(mask=5.0, dice=5.0))
    logits = (weights @ channels)[0]
    for query, x in enumerate(logits):
        for column, t in enumerate(targets[0]):
            p = x.sigmoid()
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            expected = 5 * F.binary_cross_entropy_with_logits(x, t) + 5 * dice
            assert float(costs[0, query, column]) == pytest.approx(float(expected), rel=1e-5)


def test_assignment_is_optimal_and_refuses_nan() -> None:
    costs = [
        torch.tensor(np.random.default_rng(3).random(shape)) for shape in ((2, 4, 2), (2, 2, 3), (2, 4, 0))
    ]
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
        assign([costs[0], torch.full((1, 2, 2), float("nan"))])


def random_clip(
    generator: torch.Generator, num_objects: int, num_frames: int, hw: tuple[int, int]
) -> ClipTargets:
    masks = torch.rand(num_objects, num_frames, *hw, generator=generator) > 0.4
    target = clip_targets(
        torch.randint(0, 5, (num_objects,), generator=generator), torch.arange(num_objects), masks
    )
    queries = torch.randint(0, 20, (3, num_frames, num_objects), generator=generator)
    return replace(target, frame_queries_LTN=queries)


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
        single = [
            step(head, queries_LBTQC[:, [b]], [maps[b]], [targets[b]], points, criterion) for b in range(3)
        ]
    norm = [LossNormalisers.of_batch([target], 3, 15) for target in targets]
    whole = LossNormalisers.of_batch(targets, 3, 15)
    for ours, alone in zip(batch.matches, (losses.matches[0] for losses in single), strict=True):
        assert torch.equal(ours.query_DLM, alone.query_DLM) and torch.equal(ours.object_DLM, alone.object_DLM)
    for name in ("class_D", "mask_D", "dice_D", "similarity"):
        divisor = {"class_D": "class_weight", "similarity": "similarity_pairs"}.get(name, "num_masks")
        sums = [getattr(one, name) * getattr(n, divisor) for one, n in zip(single, norm, strict=True)]
        torch.testing.assert_close(
            getattr(batch, name) * getattr(whole, divisor), sum(sums), rtol=1e-4, atol=1e-4
        )


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
    with pytest.raises(AnnotationError, match="use_sim"):
        step(golden_head(), *inputs, points, VitaCriterion(weights=LossWeights()))
    with pytest.raises(AnnotationError, match="2 objects in 2 frames"):
        replace(target, labels_N=torch.zeros(3, dtype=torch.int64))


def test_losses_stay_float32_under_bfloat16_autocast() -> None:
    golden = np.load(GOLDEN / "train.npz")
    head, points = golden_head(), FixedPoints(torch.from_numpy(np.load(GOLDEN / "targets.npz")["points"]))
    queries_LBTQC = torch.from_numpy(golden["frame_queries"]).unflatten(1, (2, 5))
    maps = torch.from_numpy(golden["raw_mask_features"]).unflatten(0, (2, 5)).unbind()
    criterion = VitaCriterion(padded_area="background")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(head, queries_LBTQC, maps, golden_targets(), points, criterion)
    losses.total.backward()
    assert losses.total.dtype == losses.mask_D.dtype == losses.class_D.dtype == torch.float32
    assert float(losses.total.detach()) == pytest.approx(EXPECTED["total"], rel=0.03)
    assert all(parameter.grad is not None for parameter in head.parameters())
