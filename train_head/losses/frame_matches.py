"""Which of the frozen detector's queries belongs to which object of a frame (VITA §3.3).

The detector never changes, so a frame's matches never change: they can be computed once and remembered.

Shapes: T frames, L detector layers, Q frame queries, N objects, P points, R stored channels,
K categories of the labels, J categories of the detector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cache.errors import ConfigError
from configs.schema import FrameMatching, PaddedArea
from train_head.losses.batch_losses import pair_costs
from train_head.losses.clip_group import ClipGroup, filled
from train_head.losses.detector_predictions import FramePredictions
from train_head.losses.logit_visits import visit_on
from train_head.losses.matcher import CostWeights, assign, point_costs
from train_head.losses.points import sample_map, sample_masks
from train_head.losses.targets import ClipTargets


def label_map(
    mode: FrameMatching, num_labels: int, num_detector_classes: int, pairs: Iterable[tuple[int, int]] = ()
) -> Tensor:
    """Build the (K, J) map of 0 and 1 that says which detector classes count as which label.

    `category_map` takes `pairs` of (label, detector class) and leaves other labels without a class cost;
    `mask_only` has none; `release` needs a detector with the data set's own classes and is the identity.
    VITA: the release knows the last only, and freezes a re-initialised class layer if the classes differ.
    """
    result_KJ = torch.zeros(num_labels, num_detector_classes)
    if mode is FrameMatching.category_map:
        for label, detector_class in pairs:
            result_KJ[label, detector_class] = 1.0
    elif mode is FrameMatching.release:
        if num_labels != num_detector_classes:
            raise ConfigError(
                "loss.frame_matching=release needs a detector with the classes of the data set",
                expected=f"{num_labels} detector classes",
                got=num_detector_classes,
                hint="set loss.frame_matching=category_map or mask_only",
            )
        result_KJ.fill_diagonal_(1.0)
    return result_KJ


def frame_points(video: str, frames: Sequence[int], num_points: int) -> Tensor:
    """Points (T, P, 2) in [0, 1] that depend on the video's name and the frame's number only."""
    digest = int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "little")
    points_TP2 = [
        np.random.default_rng([0, digest, frame]).random((num_points, 2), dtype=np.float32) for frame in frames
    ]
    return torch.from_numpy(np.stack(points_TP2))


@torch.no_grad()
def match_frames(
    predictions_TLQ: FramePredictions,
    map_TRHW: Tensor,
    targets: ClipTargets,
    label_map_KJ: Tensor,
    points_TP2: Tensor,
    cost_weights: CostWeights = CostWeights(),  # noqa: B008 (frozen)
    *,
    batched: bool = False,
) -> Tensor:
    """Detector queries of every layer, frame and object: (L, T, N) int64 on the host, -1 where absent or unmatched.

    Every (layer, frame) is one assignment problem between the Q queries and the objects present in the frame;
    costs as in the clip matching, on one frame's points, for all layers in one product, and with `batched` for all
    frames (see `problem.py`).
    """
    T, L = predictions_TLQ.class_logits.shape[:2]
    N = targets.num_objects
    matches_LTN = torch.full((L, T, N), -1)
    if N == 0:
        return matches_LTN
    find_costs = _batched_costs if batched else _costs
    cost_TLQN = find_costs(predictions_TLQ, map_TRHW, targets, points_TP2, cost_weights)
    probability_TLQJ = predictions_TLQ.class_logits.float().softmax(dim=-1)[..., :-1]
    cost_TLQN = cost_TLQN - cost_weights.label * (probability_TLQJ @ label_map_KJ[targets.labels_N].t())
    objects_T, host_TLQN = targets.objects_by_frame(), cost_TLQN.cpu().numpy()
    solved = assign([cost_LQN[..., objects.numpy()] for cost_LQN, objects in zip(host_TLQN, objects_T, strict=True)])
    for frame, (objects, (query_LM, column_LM)) in enumerate(zip(objects_T, solved, strict=True)):
        matches_LTN[:, frame].scatter_(1, objects[column_LM], query_LM)
    return matches_LTN


def _costs(
    predictions_TLQ: FramePredictions, map_TRHW: Tensor, targets: ClipTargets, points_TP2: Tensor, weights: CostWeights
) -> Tensor:
    """Mask and dice costs (T, L, Q, N), frame by frame."""
    (T, L, Q, _), N = predictions_TLQ.class_logits.shape, targets.num_objects
    channels_TPR = sample_map(map_TRHW, points_TP2, targets.image_hw)
    every_NT = torch.arange(N * T, device=map_TRHW.device).view(N, T)
    labels_GP = sample_masks(
        targets.masks_NThw.flatten(0, 1),
        every_NT.t().flatten(),
        points_TP2.repeat_interleave(N, dim=0),
        targets.image_hw,
    )
    stacked_TGR = predictions_TLQ.mask_weights.stacked().flatten(1, 2)
    problems = zip(stacked_TGR, channels_TPR, labels_GP.view(T, N, -1), strict=True)
    costs = [point_costs(stacked, [channels], labels[:, None], weights) for stacked, channels, labels in problems]
    return torch.stack(costs).view(T, L, Q, N)


def _batched_costs(
    predictions_TLQ: FramePredictions, map_TRHW: Tensor, targets: ClipTargets, points_TP2: Tensor, weights: CostWeights
) -> Tensor:
    """The same at once: every frame is a clip, with all objects of the clip."""
    frames = [
        ClipTargets(
            labels_N=targets.labels_N,
            identities_N=targets.identities_N,
            present_NT=targets.present_NT[:, frame, None],
            masks_NThw=targets.masks_NThw[:, frame, None],
        )
        for frame in range(len(map_TRHW))
    ]
    group = ClipGroup.of(slice(None), torch.split(map_TRHW, 1), frames, PaddedArea.ignore)
    channels_T1PC, labels_T1NP = group.at(points_TP2[:, None])
    weights_TGC = filled(predictions_TLQ.mask_weights.stacked()).flatten(1, 2)
    visit = visit_on(map_TRHW.device, torch.float32)
    cost_TGN = pair_costs(weights_TGC, channels_T1PC, labels_T1NP, weights, torch.float32, visit)
    return cost_TGN.view(*predictions_TLQ.class_logits.shape[:3], -1)
