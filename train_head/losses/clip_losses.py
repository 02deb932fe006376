"""The losses clip by clip and frame by frame: little exists at a time, which is what counts on a CPU.

Shapes: B clips, T frames, N objects, M matched objects of a clip and layer, V video queries, L detector layers,
D decoder layers, P points, R stored channels, K categories.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from train_head.losses.mask_folding import MaskWeights
from train_head.losses.matcher import ClipMatch, assign, point_costs
from train_head.losses.points import choose_points, sample_logits, sample_map, sample_masks, sampling_area
from train_head.losses.problem import LossProblem, LossSums
from train_head.losses.similarity import similarity_sum
from train_head.losses.targets import ClipTargets


def clip_losses(problem: LossProblem) -> LossSums:
    """Matches and sums of all clips. Raises as VitaCriterion does."""
    matches = match_clips(problem)
    mask_D, dice_D = _mask_losses(problem, matches)
    similarity = similarity_sum(problem, matches) if problem.has_similarity else None
    return LossSums(matches=matches, mask_D=mask_D, dice_D=dice_D, similarity=similarity)


@torch.no_grad()
def match_clips(problem: LossProblem) -> tuple[ClipMatch, ...]:
    """Match every clip for every layer.

    Only the features are sampled, once per clip for all D·L·V queries; labels are read at the points.
    VITA: the release draws points for every (layer, clip) problem anew; here the layers of a clip share them.
    """
    probabilities_DLBVK = problem.outputs.class_logits_DLBVK.float().softmax(dim=-1)
    D, L, _, V, _ = probabilities_DLBVK.shape
    stacked_DLBVR = problem.mask_weights.stacked()
    costs = []
    clips = zip(problem.maps, problem.targets, problem.points, strict=True)
    for clip, (map_TRHW, target, source) in enumerate(clips):
        if target.num_objects == 0:
            costs.append(probabilities_DLBVK.new_empty(D, L, V, 0))
            continue
        area_hw = sampling_area(target.image_hw, (map_TRHW.shape[2], map_TRHW.shape[3]), problem.padded_area)
        points_1P2 = source.matching_points(map_TRHW.device)[None]
        channels_TPR = sample_map(map_TRHW, points_1P2, area_hw)
        targets_NTP = _masks_at(target, points_1P2, area_hw)
        weights_GR = stacked_DLBVR[:, :, clip].flatten(0, 2)
        cost_GN = point_costs(weights_GR, channels_TPR, targets_NTP, problem.cost_weights, problem.logit_type)
        class_DLVN = probabilities_DLBVK[:, :, clip][..., target.labels_N]
        costs.append(cost_GN.view(D, L, V, -1) - problem.cost_weights.label * class_DLVN)
    solved = assign([cost.cpu().numpy() for cost in costs])
    return tuple(ClipMatch(query_DLM=query, object_DLM=chosen) for query, chosen in solved)


def _masks_at(target: ClipTargets, points_1P2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Label values at points shared by all frames: (N, T, P)."""
    masks_Ghw = target.masks_NThw.flatten(0, 1)
    every = torch.arange(len(masks_Ghw), device=masks_Ghw.device)
    return sample_masks(masks_Ghw, every, points_1P2, area_hw).view(*target.present_NT.shape, -1)


def _mask_losses(problem: LossProblem, matches: tuple[ClipMatch, ...]) -> tuple[Tensor, Tensor]:
    """Sums (D) of mask cross-entropy and dice over matched queries, the only ones with a logit map."""
    D = len(problem.mask_weights.weights_R)
    mask_D = dice_D = problem.mask_weights.weights_R.new_zeros(D)
    clips = zip(problem.maps, problem.targets, matches, problem.points, strict=True)
    for clip, (map_TRHW, target, match, source) in enumerate(clips):
        matched = _take_matched(problem.mask_weights, clip, match)
        area_hw = sampling_area(target.image_hw, (map_TRHW.shape[2], map_TRHW.shape[3]), problem.padded_area)
        points = source.loss_points(len(map_TRHW), map_TRHW.device)
        parts = []
        for frame in range(len(map_TRHW)):  # one at a time, so that little exists at once
            logits_GHW = matched.logits(map_TRHW[frame, None])[0]
            points_GP2 = choose_points(logits_GHW.detach(), points, frame, area_hw)
            labels_GP = _labels_at(target, frame, match.object_DLM, points_GP2, area_hw)
            parts.append(point_sums(sample_logits(logits_GHW, points_GP2, area_hw), labels_GP))
        counted_TM = None if problem.absent_frames else target.present_NT[match.object_DLM.flatten()].t()
        mask_M, dice_M = frame_means(torch.stack(parts, dim=1), counted_TM)
        mask_D = mask_D + mask_M.view(D, -1).sum(dim=1)
        dice_D = dice_D + dice_M.view(D, -1).sum(dim=1)
    return mask_D, dice_D


def _take_matched(mask_weights: MaskWeights, clip: int, match: ClipMatch) -> MaskWeights:
    """The folded embeddings of a clip's matched queries, layers flattened: (D·L·M, R)."""
    weights_DLMR = torch.take_along_dim(mask_weights.weights_R[:, :, clip], match.query_DLM[..., None], dim=2)
    const_DLM = torch.take_along_dim(mask_weights.const[:, :, clip], match.query_DLM, dim=2)
    return MaskWeights(weights_R=weights_DLMR.flatten(0, 2), const=const_DLM.flatten())


def _labels_at(
    target: ClipTargets, frame: int, object_DLM: Tensor, points_GP2: Tensor, area_hw: tuple[int, int]
) -> Tensor:
    """Label values (D·L·M, P) of the matched objects in a frame.

    If all objects are matched, they are the same in every layer: then each mask is read once for all layers.
    """
    num_matched, P, _ = points_GP2.shape
    layers = object_DLM.shape[0] * object_DLM.shape[1] if object_DLM.shape[2] == target.num_objects else 1
    objects = object_DLM.reshape(layers, -1)[0]
    points_SP2 = points_GP2.view(layers, len(objects), P, 2).transpose(0, 1).reshape(len(objects), layers * P, 2)
    labels_SP = sample_masks(target.masks_NThw[:, frame], objects, points_SP2, area_hw)
    return labels_SP.view(len(objects), layers, P).transpose(0, 1).reshape(num_matched, P)


def point_sums(logits_GP: Tensor, labels_GP: Tensor) -> Tensor:
    """What the losses need of the points (..., P) of every map: mean cross-entropy, overlap and area, (3, ...)."""
    mask_G = F.binary_cross_entropy_with_logits(logits_GP, labels_GP, reduction="none").mean(dim=-1)
    probability_GP = logits_GP.sigmoid()
    overlap_G = (probability_GP * labels_GP).sum(dim=-1)
    area_G = probability_GP.sum(dim=-1) + labels_GP.sum(dim=-1)
    return torch.stack([mask_G, overlap_G, area_G])


def frame_means(sums_3TM: Tensor, counted_TM: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy, mean over the counted frames (None: over all), and dice over all points: both (..., M).

    `sums_3TM`: (3, ..., T, M) of `point_sums`.
    """
    mask_TM, overlap_TM, area_TM = sums_3TM
    mask_M = mask_TM.mean(dim=-2) if counted_TM is None else (mask_TM * counted_TM).sum(dim=-2) / counted_TM.sum(dim=-2)
    return mask_M, 1 - (2 * overlap_TM.sum(dim=-2) + 1) / (area_TM.sum(dim=-2) + 1)
