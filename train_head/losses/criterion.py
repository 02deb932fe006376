"""Losses of the head (VITA §3.3).

Shapes: B clips, T frames, M matched objects of a clip and layer, V video queries, L detector layers,
D decoder layers, P points, R stored channels, K categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import PaddedArea
from train_head.heads.contract import HeadOutputs
from train_head.losses.mask_folding import MaskWeights
from train_head.losses.matcher import ClipMatch, CostWeights, match_clips
from train_head.losses.points import PointSource, sample_logits, sample_masks, sampling_area
from train_head.losses.similarity import num_similarity_pairs, similarity_loss
from train_head.losses.targets import ClipTargets


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss terms, and of "no object" among the classes."""

    label: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    similarity: float = 0.5
    no_object: float = 0.1


@dataclass(frozen=True, kw_only=True)
class LossNormalisers:
    """What the sums are divided by. Sum `stacked` over processes to train as with one large batch."""

    num_masks: Tensor
    class_weight: Tensor
    similarity_pairs: Tensor

    @classmethod
    def of_batch(
        cls, targets: Sequence[ClipTargets], num_layers: int, num_queries: int, no_object: float = 0.1
    ) -> LossNormalisers:
        """Normalisers of a batch: objects × L, class weights of all queries, pairs of the similarity loss."""
        matched = [min(num_queries, target.num_objects) for target in targets]
        class_weight = sum(count + no_object * (num_queries - count) for count in matched)
        pairs = num_similarity_pairs(targets, num_queries)
        return cls(
            num_masks=pairs.new_full((), num_layers * sum(target.num_objects for target in targets)),
            class_weight=pairs.new_full((), num_layers * class_weight),
            similarity_pairs=pairs,
        )

    def stacked(self) -> Tensor:
        """All three as one tensor (3), for one reduction."""
        return torch.stack([self.num_masks, self.class_weight, self.similarity_pairs])

    @classmethod
    def from_stacked(cls, values_3: Tensor) -> LossNormalisers:
        """Inverse of `stacked`."""
        num_masks, class_weight, pairs = values_3.unbind()
        return cls(num_masks=num_masks, class_weight=class_weight, similarity_pairs=pairs)


@dataclass(frozen=True, kw_only=True)
class VitaLosses:
    """Unweighted terms per decoder layer (the last is the final output) and the weighted total."""

    class_D: Tensor
    mask_D: Tensor
    dice_D: Tensor
    similarity: Tensor
    total: Tensor
    matches: tuple[ClipMatch, ...]


@dataclass(frozen=True, kw_only=True)
class VitaCriterion:
    """Matches the outputs of all layers with the objects, then computes every loss term in float32.

    `matching_type` is the precision of the mask logits that the matching alone sees: under automatic mixed precision
    the release's are half precision too.
    """

    weights: LossWeights = field(default_factory=LossWeights)
    cost_weights: CostWeights = field(default_factory=CostWeights)
    padded_area: PaddedArea = PaddedArea.ignore
    matching_type: torch.dtype = torch.float32
    absent_frames: bool = True  # VITA: the release's cross-entropy counts frames without the object too

    def __call__(
        self,
        outputs: HeadOutputs,
        mask_weights: MaskWeights,
        maps: Sequence[Tensor],
        targets: Sequence[ClipTargets],
        points: Sequence[PointSource],
        normalisers: LossNormalisers,
    ) -> VitaLosses:
        """Losses of B clips. `mask_weights`: the folded `mask_embed_DLBVC`; `maps`: B of (T, R, H, W).

        Raises FloatingPointError if an output is not finite, AnnotationError if frame matches are missing.
        """
        with torch.autocast(mask_weights.weights_R.device.type, enabled=False):
            matches = match_clips(
                outputs.class_logits_DLBVK,
                mask_weights,
                maps,
                targets,
                points,
                cost_weights=self.cost_weights,
                padded_area=self.padded_area,
                logit_type=self.matching_type,
            )
            class_D = self._class_loss(outputs.class_logits_DLBVK, targets, matches) / normalisers.class_weight
            mask_D, dice_D = (
                summed_D / normalisers.num_masks.clamp(min=1)
                for summed_D in self._mask_losses(mask_weights, maps, targets, matches, points)
            )
            similarity = class_D.new_zeros(())
            if outputs.frame_similarity_LBTQC is not None and outputs.clip_similarity_LBVC is not None:
                similarity = similarity_loss(
                    outputs.frame_similarity_LBTQC,
                    outputs.clip_similarity_LBVC,
                    targets,
                    matches,
                    normalisers.similarity_pairs,
                )
            weights = self.weights
            layers_D = weights.label * class_D + weights.mask * mask_D + weights.dice * dice_D
            total = layers_D.sum() + weights.similarity * similarity
        return VitaLosses(
            class_D=class_D, mask_D=mask_D, dice_D=dice_D, similarity=similarity, total=total, matches=matches
        )

    def _class_loss(self, logits_DLBVK: Tensor, targets: Sequence[ClipTargets], matches: Sequence[ClipMatch]) -> Tensor:
        """Sums (D) of the weighted cross-entropy; unmatched queries are "no object"."""
        D, _, _, _, num_labels = logits_DLBVK.shape
        wanted_DLBV = torch.full_like(logits_DLBVK[..., 0], num_labels - 1, dtype=torch.int64)
        for clip, (target, match) in enumerate(zip(targets, matches, strict=True)):
            wanted_DLBV[:, :, clip].scatter_(2, match.query_DLM, target.labels_N[match.object_DLM])
        class_weights = logits_DLBVK.new_ones(num_labels, dtype=torch.float32)
        class_weights[-1] = self.weights.no_object
        losses = F.cross_entropy(
            logits_DLBVK.float().flatten(0, 3), wanted_DLBV.flatten(), class_weights, reduction="none"
        )
        return losses.view(D, -1).sum(dim=1)

    def _mask_losses(
        self,
        mask_weights: MaskWeights,
        maps: Sequence[Tensor],
        targets: Sequence[ClipTargets],
        matches: Sequence[ClipMatch],
        points: Sequence[PointSource],
    ) -> tuple[Tensor, Tensor]:
        """Sums (D) of mask cross-entropy and dice over matched queries, the only ones with a logit map."""
        D = len(mask_weights.weights_R)
        mask_D = dice_D = mask_weights.weights_R.new_zeros(D)
        for clip, (map_TRHW, target, match, source) in enumerate(zip(maps, targets, matches, points, strict=True)):
            matched = _take_matched(mask_weights, clip, match)
            area_hw = sampling_area(target.image_hw, (map_TRHW.shape[2], map_TRHW.shape[3]), self.padded_area)
            parts = []
            for frames in _frame_groups(map_TRHW):
                logits_TMHW = matched.logits(map_TRHW[frames])
                logits_GHW = logits_TMHW.flatten(0, 1)
                points_GP2 = source.loss_points(logits_GHW.detach(), area_hw)
                points_TMP2 = torch.unflatten(points_GP2, 0, logits_TMHW.shape[:2])
                labels_TMP = _labels_at(target, frames, match.object_DLM, points_TMP2, area_hw)
                parts.append(_point_sums(sample_logits(logits_GHW, points_GP2, area_hw), labels_TMP))
            counted_TM = None if self.absent_frames else target.present_NT[match.object_DLM.flatten()].t()
            mask_M, dice_M = _point_losses(torch.cat(parts, dim=1), counted_TM)
            mask_D = mask_D + mask_M.view(D, -1).sum(dim=1)
            dice_D = dice_D + dice_M.view(D, -1).sum(dim=1)
        return mask_D, dice_D


def _take_matched(mask_weights: MaskWeights, clip: int, match: ClipMatch) -> MaskWeights:
    """The folded embeddings of a clip's matched queries, layers flattened: (D·L·M, R)."""
    weights_DLMR = torch.take_along_dim(mask_weights.weights_R[:, :, clip], match.query_DLM[..., None], dim=2)
    const_DLM = torch.take_along_dim(mask_weights.const[:, :, clip], match.query_DLM, dim=2)
    return MaskWeights(weights_R=weights_DLMR.flatten(0, 2), const=const_DLM.flatten())


def _frame_groups(map_TRHW: Tensor) -> list[slice]:
    """Frames whose mask losses are computed at once: on CPU one, so that little exists at a time."""
    T = len(map_TRHW)
    step = T if map_TRHW.is_cuda else 1
    return [slice(start, start + step) for start in range(0, T, step)]


def _labels_at(
    target: ClipTargets, frames: slice, object_DLM: Tensor, points_TMP2: Tensor, area_hw: tuple[int, int]
) -> Tensor:
    """Label values (T, D·L·M, P) of the matched objects in some frames.

    If all objects are matched, they are the same in every layer: then each mask is read once for all layers.
    """
    T, num_matched, P, _ = points_TMP2.shape
    layers = object_DLM.shape[0] * object_DLM.shape[1] if object_DLM.shape[2] == target.num_objects else 1
    objects = object_DLM.reshape(layers, -1)[0]
    index_TM = objects * T + torch.arange(T, device=objects.device)[:, None]
    points_SP2 = (
        points_TMP2.view(T, layers, len(objects), P, 2).transpose(1, 2).reshape(index_TM.numel(), layers * P, 2)
    )
    labels_SP = sample_masks(target.masks_NThw[:, frames].flatten(0, 1), index_TM.flatten(), points_SP2, area_hw)
    return labels_SP.view(T, len(objects), layers, P).transpose(1, 2).reshape(T, num_matched, P)


def _point_sums(logits_GP: Tensor, labels_TMP: Tensor) -> Tensor:
    """What the losses need of each map's points: mean cross-entropy, overlap and area, (3, T, M)."""
    labels_GP = labels_TMP.flatten(0, 1)
    mask_G = F.binary_cross_entropy_with_logits(logits_GP, labels_GP, reduction="none").mean(dim=1)
    probability_GP = logits_GP.sigmoid()
    overlap_G = (probability_GP * labels_GP).sum(dim=1)
    area_G = probability_GP.sum(dim=1) + labels_GP.sum(dim=1)
    return torch.stack([mask_G, overlap_G, area_G]).view(3, *labels_TMP.shape[:2])


def _point_losses(sums_3TM: Tensor, counted_TM: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy, mean over the counted frames (None: over all), and dice over all points: both (M)."""
    mask_TM, overlap_TM, area_TM = sums_3TM
    mask_M = mask_TM.mean(dim=0) if counted_TM is None else (mask_TM * counted_TM).sum(dim=0) / counted_TM.sum(dim=0)
    return mask_M, 1 - (2 * overlap_TM.sum(dim=0) + 1) / (area_TM.sum(dim=0) + 1)
