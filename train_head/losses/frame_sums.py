"""The losses' sums of one frame from channels sampled at few points, with their gradients in the same breath.

All masks of a frame choose among the same points. Where these are fewer than the map's pixels, logits are needed
there alone, and what the sums change with the mask weights is one product more: neither dense logits nor, for the
backward pass, the sampled channels are kept.

Shapes: G matched queries, S points of a frame, P of them chosen by each query, N objects, C stored channels, with the
coverage as one more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train_head.losses.points import LossPoints, smallest
from train_head.products import product


def point_sums(logits_GP: Tensor, labels_GP: Tensor) -> Tensor:
    """What the losses need of the points (..., P) of every map: mean cross-entropy, overlap and area, (3, ...)."""
    mask_G = F.binary_cross_entropy_with_logits(logits_GP, labels_GP, reduction="none").mean(dim=-1)
    probability_GP = logits_GP.sigmoid()
    overlap_G = (probability_GP * labels_GP).sum(dim=-1)
    area_G = probability_GP.sum(dim=-1) + labels_GP.sum(dim=-1)
    return torch.stack([mask_G, overlap_G, area_G])


def frame_sums(
    weights_GC: Tensor, channels_SC: Tensor, labels_NS: Tensor, object_G: Tensor, points: LossPoints
) -> Tensor:
    """As `point_sums` of the points that each query chooses, differentiable in the weights: (3, G)."""
    sums_3G: Tensor = _FrameSums.apply(weights_GC, channels_SC, labels_NS, object_G, points)
    return sums_3G


class _FrameSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights_GC: Tensor, channels_SC: Tensor, labels_NS: Tensor, object_G: Tensor, points: LossPoints
    ) -> Tensor:
        logits_GS = product(weights_GC, channels_SC)
        chosen_GP = _choose(logits_GS, points)
        logits_GP, labels_GP = logits_GS.gather(1, chosen_GP), labels_NS[object_G].gather(1, chosen_GP)
        probability_GP = logits_GP.sigmoid()
        slope_GP = probability_GP * (1 - probability_GP)
        # How each of the three sums changes with a point's logit.
        changes_3GP = torch.stack([(probability_GP - labels_GP) / chosen_GP.shape[1], slope_GP * labels_GP, slope_GP])
        changes_3GS = logits_GS.new_zeros(3, *logits_GS.shape)
        changes_3GS.scatter_(2, chosen_GP.expand(3, -1, -1), changes_3GP)
        ctx.save_for_backward(torch.unflatten(product(changes_3GS.flatten(0, 1), channels_SC.t()), 0, (3, -1)))
        return point_sums(logits_GP, labels_GP)

    @staticmethod
    def backward(ctx: Any, gradient_3G: Tensor) -> tuple[Tensor | None, ...]:
        (changes_3GC,) = ctx.saved_tensors
        return (gradient_3G[..., None] * changes_3GC).sum(dim=0), None, None, None, None


def _choose(logits_GS: Tensor, points: LossPoints) -> Tensor:
    """Which points each query takes: the candidates of the most uncertain logits, and all that follow them: (G, P)."""
    fresh_F = torch.arange(points.num_candidates, logits_GS.shape[1], device=logits_GS.device)
    fresh_GF = fresh_F.expand(len(logits_GS), -1)
    if points.keep == 0:
        return fresh_GF
    return torch.cat([smallest(logits_GS[:, : points.num_candidates].abs(), points.keep), fresh_GF], dim=1)
