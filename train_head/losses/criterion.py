"""Losses of the head (VITA §3.3).

Shapes: B clips, T frames, M matched objects of a clip and layer, V video queries, L detector layers,
D decoder layers, R stored channels, K categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import PaddedArea
from train_head.heads.contract import HeadOutputs
from train_head.heads.mask_folding import MaskWeights
from train_head.losses.batch_losses import batch_losses, match_batch
from train_head.losses.clip_losses import clip_losses, match_clips
from train_head.losses.host_copies import send
from train_head.losses.matcher import ClipMatch, CostWeights
from train_head.losses.points import PointSource
from train_head.losses.problem import LossProblem
from train_head.losses.similarity import num_similarity_pairs
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
    the release's are half precision too. `batched` takes all clips at once, for devices where launches cost: the same
    numbers (see `problem.py`).
    """

    weights: LossWeights = field(default_factory=LossWeights)
    cost_weights: CostWeights = field(default_factory=CostWeights)
    padded_area: PaddedArea = PaddedArea.ignore
    matching_type: torch.dtype = torch.float32
    absent_frames: bool = True  # VITA: the release's cross-entropy counts frames without the object too
    batched: bool = False

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
        problem = self._problem(outputs, mask_weights, maps, targets, points)
        with torch.autocast(mask_weights.weights_R.device.type, enabled=False):
            sums = batch_losses(problem) if self.batched else clip_losses(problem)
            class_D = self._class_loss(outputs.class_logits_DLBVK, targets, sums.matches) / normalisers.class_weight
            num_masks = normalisers.num_masks.clamp(min=1)
            mask_D, dice_D = sums.mask_D / num_masks, sums.dice_D / num_masks
            similarity = class_D.new_zeros(())
            if sums.similarity is not None:
                similarity = sums.similarity / normalisers.similarity_pairs
            weights = self.weights
            layers_D = weights.label * class_D + weights.mask * mask_D + weights.dice * dice_D
            total = layers_D.sum() + weights.similarity * similarity
        return VitaLosses(
            class_D=class_D, mask_D=mask_D, dice_D=dice_D, similarity=similarity, total=total, matches=sums.matches
        )

    def match(
        self,
        outputs: HeadOutputs,
        mask_weights: MaskWeights,
        maps: Sequence[Tensor],
        targets: Sequence[ClipTargets],
        points: Sequence[PointSource],
    ) -> tuple[ClipMatch, ...]:
        """Do the matching alone."""
        problem = self._problem(outputs, mask_weights, maps, targets, points)
        return match_batch(problem) if self.batched else match_clips(problem)

    def _problem(
        self,
        outputs: HeadOutputs,
        mask_weights: MaskWeights,
        maps: Sequence[Tensor],
        targets: Sequence[ClipTargets],
        points: Sequence[PointSource],
    ) -> LossProblem:
        return LossProblem(
            outputs=outputs,
            mask_weights=mask_weights,
            maps=maps,
            targets=targets,
            points=points,
            cost_weights=self.cost_weights,
            padded_area=self.padded_area,
            logit_type=self.matching_type,
            absent_frames=self.absent_frames,
        )

    def _class_loss(self, logits_DLBVK: Tensor, targets: Sequence[ClipTargets], matches: Sequence[ClipMatch]) -> Tensor:
        """Sums (D) of the weighted cross-entropy; unmatched queries are "no object"."""
        D, _, _, _, num_labels = logits_DLBVK.shape
        wanted_DLBV = np.full(logits_DLBVK.shape[:-1], num_labels - 1, dtype=np.int64)
        for clip, (target, match) in enumerate(zip(targets, matches, strict=True)):
            labels_DLM = target.labels_N.numpy()[match.object_DLM.numpy()]
            np.put_along_axis(wanted_DLBV[:, :, clip], match.query_DLM.numpy(), labels_DLM, axis=2)
        (wanted,) = send([wanted_DLBV], logits_DLBVK.device)
        class_weights = logits_DLBVK.new_ones(num_labels, dtype=torch.float32)
        class_weights[-1].fill_(self.weights.no_object)  # assigned, it would be a copy from the host in torch 2.11
        losses = F.cross_entropy(logits_DLBVK.float().flatten(0, 3), wanted.flatten(), class_weights, reduction="none")
        return losses.view(D, -1).sum(dim=1)
