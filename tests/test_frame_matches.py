"""Frame-level matches against a literal, frame by frame, query by query computation of their costs."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import ConfigError
from cache.heads import DetectorHeads
from configs.schema import FrameMatching
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.frame_matches import frame_points, label_map, match_frames
from train_head.losses.matcher import CostWeights
from train_head.losses.targets import ClipTargets, clip_targets

T, L, Q, C, E, CHANNELS, R, P = 3, 2, 5, 8, 6, 7, 4, 40
HW, NUM_LABELS, NUM_CLASSES = (22, 30), 4, 3


def random_heads(rng: np.random.Generator) -> DetectorHeads:
    shapes = {
        "decoder_norm.weight": (C,),
        "decoder_norm.bias": (C,),
        "class_embed.weight": (NUM_CLASSES + 1, C),
        "class_embed.bias": (NUM_CLASSES + 1,),
        "mask_embed.layers.0.weight": (C, C),
        "mask_embed.layers.0.bias": (C,),
        "mask_embed.layers.1.weight": (C, C),
        "mask_embed.layers.1.bias": (C,),
        "mask_embed.layers.2.weight": (E, C),
        "mask_embed.layers.2.bias": (E,),
        "mask_features.weight": (E, CHANNELS),
        "mask_features.bias": (E,),
    }
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return DetectorHeads(arrays=arrays, category_names=())


def literal_predictions(heads: DetectorHeads, queries: Tensor, map_TCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (T, L, Q, J + 1) and mask logits (T, L, Q, H, W) from the arrays alone."""
    a = {name: torch.from_numpy(array) for name, array in heads.arrays.items()}
    normed = F.layer_norm(queries, (C,), a["decoder_norm.weight"], a["decoder_norm.bias"])
    hidden = normed
    for layer in range(3):
        hidden = F.linear(hidden, a[f"mask_embed.layers.{layer}.weight"], a[f"mask_embed.layers.{layer}.bias"])
        hidden = hidden.relu() if layer < 2 else hidden
    features = F.conv2d(map_TCHW, a["mask_features.weight"][..., None, None], a["mask_features.bias"])
    probabilities = F.linear(normed, a["class_embed.weight"], a["class_embed.bias"]).softmax(-1)
    return probabilities, torch.einsum("tlqe,tehw->tlqhw", hidden, features)


def literal_cost(
    probability_J: Tensor,
    logits_HW: Tensor,
    mask_hw: Tensor,
    classes: list[int],
    points_P2: Tensor,
    weights: CostWeights,
) -> float:
    """Such as 2 · (−p) + 5 · cross-entropy + 5 · dice of one query and one object of one frame."""
    canvas = torch.zeros(logits_HW.shape[0] * 4, logits_HW.shape[1] * 4)
    canvas[: HW[0], : HW[1]] = mask_hw
    scale = torch.tensor((HW[1] / canvas.shape[1], HW[0] / canvas.shape[0]))
    grid = (points_P2 * scale * 2 - 1)[None, None]
    x = F.grid_sample(logits_HW[None, None], grid, align_corners=False).flatten()
    t = F.grid_sample(canvas[None, None], grid, align_corners=False).flatten()
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    masks = float(weights.mask * F.binary_cross_entropy_with_logits(x, t) + weights.dice * dice)
    return masks - weights.label * float(sum(probability_J[classes]))


@pytest.mark.parametrize(
    ("mode", "classes_of_label"),
    [("category_map", [[0, 2], [1], [], []]), ("mask_only", [[], [], [], []]), ("release", [[0], [1], [2]])],
)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("weights", [(2.0, 5.0, 5.0), (30.0, 1.0, 1.0), (1.0, 30.0, 1.0), (1.0, 1.0, 30.0)])
def test_matches_are_the_cheapest_by_the_literal_costs(
    mode: str, classes_of_label: list[list[int]], batched: bool, weights: tuple[float, float, float]
) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    heads = random_heads(rng)
    decoding = MapDecoding(
        matrix_CR=torch.randn(CHANNELS, R, generator=generator),
        mean_C=torch.randn(CHANNELS, generator=generator),
    )
    stored_TRHW = torch.randn(T, R, 7, 9, generator=generator)  # ceil of 22 × 30 / 4, and one more
    queries = torch.randn(T, L, Q, C, generator=generator)
    labels_N = torch.tensor([0, 1, 2, 0] if mode == "release" else [0, 1, 3, 2])
    masks_NThw = (torch.rand(4, T, *HW, generator=generator) > 0.7).byte()
    masks_NThw[1, 0] = masks_NThw[2, 1] = masks_NThw[:, 2] = 0  # absent: some, and everything in the last frame
    targets = clip_targets(labels_N, torch.arange(4), masks_NThw)
    points_TP2 = frame_points("7", [4, 9, 2], P)

    frozen = FrozenHeads(heads)
    pairs = [(label, number) for label, numbers in enumerate(classes_of_label) for number in numbers]
    map_KJ = label_map(FrameMatching(mode), len(classes_of_label), NUM_CLASSES, pairs)
    predictions = frozen.predict(frozen.normed(queries), decoding)
    costs = CostWeights(label=weights[0], mask=weights[1], dice=weights[2])
    actual_LTN = match_frames(predictions, stored_TRHW, targets, map_KJ, points_TP2, costs, batched=batched)

    decompressed = torch.einsum("cr,trhw->tchw", decoding.matrix_CR, stored_TRHW) + decoding.mean_C[:, None, None]
    probabilities, logits = literal_predictions(heads, queries, decompressed)
    assert (actual_LTN >= 0).equal(targets.present_NT.t().expand(L, -1, -1))
    for layer in range(L):
        for frame in range(T):
            objects = targets.present_NT[:, frame].nonzero().flatten().tolist()
            cost = [
                [
                    literal_cost(
                        probabilities[frame, layer, query],
                        logits[frame, layer, query],
                        targets.masks_NThw[n, frame],
                        classes_of_label[labels_N[n]],
                        points_TP2[frame],
                        costs,
                    )
                    for n in objects
                ]
                for query in range(Q)
            ]
            best = min(permutations(range(Q), len(objects)), key=lambda p: sum(cost[q][i] for i, q in enumerate(p)))
            assert actual_LTN[layer, frame, objects].tolist() == list(best)


def test_more_objects_than_queries_and_empty_clips() -> None:
    generator = torch.Generator().manual_seed(1)
    frozen = FrozenHeads(random_heads(np.random.default_rng(1)))
    decoding = MapDecoding()
    predictions = frozen.predict(torch.randn(1, L, Q, C, generator=generator), decoding)
    map_TRHW = torch.randn(1, CHANNELS, 6, 8, generator=generator)
    masks = torch.rand(7, 1, *HW, generator=generator) > 0.5
    crowd = clip_targets(torch.zeros(7, dtype=torch.int64), torch.arange(7), masks)
    map_KJ = label_map(FrameMatching.mask_only, NUM_LABELS, NUM_CLASSES)
    matches = match_frames(predictions, map_TRHW, crowd, map_KJ, frame_points("a", [0], P))
    for layer in range(L):
        assert sorted(matches[layer, 0].tolist()) == [-1, -1, *range(Q)]
    empty: ClipTargets = clip_targets(crowd.labels_N, crowd.identities_N, masks & False)
    assert match_frames(predictions, map_TRHW, empty, map_KJ, frame_points("a", [0], P)).shape == (L, 1, 0)


def test_points_belong_to_video_and_frame() -> None:
    points = frame_points("12@flip", [3, 5], 6)
    assert points.shape == (2, 6, 2) and points.min() >= 0 and points.max() <= 1
    assert torch.equal(points[1], frame_points("12@flip", [5], 6)[0])
    assert not torch.equal(points[0], points[1])
    assert not torch.equal(points[0], frame_points("12", [3], 6)[0])


def test_the_release_s_mode_needs_the_data_set_s_classes() -> None:
    with pytest.raises(ConfigError, match="mask_only"):
        label_map(FrameMatching.release, 40, 80)
