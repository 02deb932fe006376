"""The losses clip by clip and frame by frame: little exists at a time, which is what counts on a CPU.

Shapes: B clips, T frames, N objects, M matched objects of a clip and layer, V video queries, L detector layers,
D decoder layers, P points, R stored channels, K categories.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from train_head.heads.mask_folding import MaskWeights
from train_head.losses.frame_sums import few_point_sums, many_point_sums
from train_head.losses.matcher import ClipMatch, assign, point_costs
from train_head.losses.points import (
    LossPoints,
    sample_map,
    sample_masks,
    sampling_area,
)
from train_head.losses.problem import LossProblem, LossSums
from train_head.losses.similarity import similarity_sum
from train_head.losses.targets import ClipTargets


def clip_losses(problem: LossProblem) -> LossSums:
    """Matches and sums of all clips. Raises as VitaCriterion does."""
    matches = []
    mask_D = dice_D = problem.mask_weights.weights_R.new_zeros(len(problem.mask_weights.weights_R))
    for clip in _Clip.all_of(problem):
        matches.append(_match(clip))
        clip_mask_D, clip_dice_D = _mask_losses(clip, matches[-1])
        mask_D, dice_D = mask_D + clip_mask_D, dice_D + clip_dice_D
        clip.kept_TSC.clear()  # some 40 MB of every clip at real size
    similarity = similarity_sum(problem, matches) if problem.has_similarity else None
    return LossSums(matches=tuple(matches), mask_D=mask_D, dice_D=dice_D, similarity=similarity)


def match_clips(problem: LossProblem) -> tuple[ClipMatch, ...]:
    """Match every clip for every layer."""
    return tuple(_match(clip) for clip in _Clip.all_of(problem))


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """One clip of a problem, with its points; the layers of a clip share them.

    VITA: the release draws points for every (layer, clip) problem anew.
    """

    problem: LossProblem
    index: int
    map_TRHW: Tensor
    target: ClipTargets
    area_hw: tuple[int, int]
    matching_1P2: Tensor
    losses: LossPoints
    kept_TSC: list[Tensor] = field(default_factory=list)
    """Channels at the points of the losses, if these are few, once the clip is matched."""

    @classmethod
    def all_of(cls, problem: LossProblem) -> list[_Clip]:
        """Draw the points of all clips: those of the matching first, and none where nothing is to be matched."""
        device, clips = problem.maps[0].device, list(zip(problem.targets, problem.points, strict=True))
        none = torch.zeros(1, 2, device=device)
        matching = [source.matching_points(device) if target.num_objects else none for target, source in clips]
        losses = [source.loss_points(len(problem.maps[0]), device) for _, source in clips]
        return [cls._of(problem, index, matching[index], losses[index]) for index in range(len(clips))]

    @classmethod
    def _of(cls, problem: LossProblem, index: int, matching_P2: Tensor, losses: LossPoints) -> _Clip:
        map_TRHW, target = problem.maps[index], problem.targets[index]
        return cls(
            problem=problem,
            index=index,
            map_TRHW=map_TRHW,
            target=target,
            area_hw=sampling_area(target.image_hw, (map_TRHW.shape[2], map_TRHW.shape[3]), problem.padded_area),
            matching_1P2=matching_P2[None],
            losses=losses,
        )

    @property
    def few_points(self) -> bool:
        """Whether channels at the points of the losses cost less than dense logits, which gradients of maps need."""
        pixels = self.map_TRHW.shape[2] * self.map_TRHW.shape[3]
        return self.losses.points_GS2.shape[1] <= pixels and not self.map_TRHW.requires_grad

    def channels(self) -> Iterator[Tensor]:
        """T of (P, C): what the map holds at the points of the matching; in the same pass few others are kept."""
        if not self.few_points:
            yield from sample_map(self.map_TRHW, self.matching_1P2, self.area_hw)
            return
        points_T = self.matching_1P2.expand(len(self.map_TRHW), -1, -1)
        P = points_T.shape[1]
        both_TX2 = torch.cat([points_T, self.losses.points_GS2], dim=1)
        for channels_XC in sample_map(self.map_TRHW, both_TX2, self.area_hw):
            self.kept_TSC.append(channels_XC[P:])
            yield channels_XC[:P]


@torch.no_grad()
def _match(clip: _Clip) -> ClipMatch:
    """Match a clip for every layer.

    Only the features are sampled, once for all D·L·V queries; labels are read at the points.
    """
    problem, target = clip.problem, clip.target
    probabilities_DLVK = problem.outputs.class_logits_DLBVK[:, :, clip.index].float().softmax(dim=-1)
    cost_DLVN = -problem.cost_weights.label * probabilities_DLVK[..., target.labels_N]
    if target.num_objects:
        targets_NTP = _masks_at(target, clip.matching_1P2, clip.area_hw)
        every = problem.mask_weights
        weights = MaskWeights(weights_R=every.weights_R[:, :, clip.index], const=every.const[:, :, clip.index])
        weights_GC = weights.stacked().flatten(0, 2)
        cost_GN = point_costs(weights_GC, clip.channels(), targets_NTP, problem.cost_weights, problem.logit_type)
        cost_DLVN = cost_GN.view(cost_DLVN.shape) + cost_DLVN
    ((query_DLM, object_DLM),) = assign([cost_DLVN.cpu().numpy()], first=clip.index)
    return ClipMatch(query_DLM=query_DLM, object_DLM=object_DLM)


def _masks_at(target: ClipTargets, points_1P2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Label values at points shared by all frames: (N, T, P)."""
    masks_Ghw = target.masks_NThw.flatten(0, 1)
    every = torch.arange(len(masks_Ghw), device=masks_Ghw.device)
    return sample_masks(masks_Ghw, every, points_1P2, area_hw).view(*target.present_NT.shape, -1)


def _mask_losses(clip: _Clip, match: ClipMatch) -> tuple[Tensor, Tensor]:
    """Sums (D) of mask cross-entropy and dice over a clip's matched queries."""
    matched = _take_matched(clip.problem.mask_weights, clip.index, match)
    object_G = match.object_DLM.flatten()
    # One frame at a time, so that little exists at once.
    parts = [_frame_sums(clip, frame, matched, object_G) for frame in range(len(clip.map_TRHW))]
    counted_TM = None if clip.problem.absent_frames else clip.target.present_NT[object_G].t()
    losses = frame_means(torch.stack(parts, dim=1), counted_TM)
    mask_D, dice_D = (loss_M.view(len(match.query_DLM), -1).sum(dim=1) for loss_M in losses)
    return mask_D, dice_D


def _frame_sums(clip: _Clip, frame: int, matched: MaskWeights, object_G: Tensor) -> Tensor:
    """The sums (3, G) of a frame."""
    masks_Nhw, points = clip.target.masks_NThw[:, frame], clip.losses
    every = torch.arange(len(masks_Nhw))
    labels_NS = sample_masks(masks_Nhw, every, points.points_GS2[frame, None], clip.area_hw)
    if clip.kept_TSC:
        return few_point_sums(matched.stacked(), clip.kept_TSC[frame], labels_NS, object_G, points)
    return many_point_sums(matched, clip.map_TRHW[frame], labels_NS, object_G, points, frame, clip.area_hw)


def _take_matched(mask_weights: MaskWeights, clip: int, match: ClipMatch) -> MaskWeights:
    """The folded embeddings of a clip's matched queries, layers flattened: (D·L·M, R)."""
    weights_DLMR = torch.take_along_dim(mask_weights.weights_R[:, :, clip], match.query_DLM[..., None], dim=2)
    const_DLM = torch.take_along_dim(mask_weights.const[:, :, clip], match.query_DLM, dim=2)
    return MaskWeights(weights_R=weights_DLMR.flatten(0, 2), const=const_DLM.flatten())


def frame_means(sums_3TM: Tensor, counted_TM: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy, mean over the counted frames (None: over all), and dice over all points: both (..., M).

    `sums_3TM`: (3, ..., T, M) of `point_sums`.
    """
    mask_TM, overlap_TM, area_TM = sums_3TM
    mask_M = mask_TM.mean(dim=-2) if counted_TM is None else (mask_TM * counted_TM).sum(dim=-2) / counted_TM.sum(dim=-2)
    return mask_M, 1 - (2 * overlap_TM.sum(dim=-2) + 1) / (area_TM.sum(dim=-2) + 1)
