"""The losses' sums of one frame, whose masks all choose among the same points, with gradients in few passes.

Where these points are fewer than the map's pixels, logits are needed there alone: `few_point_sums` multiplies channels
that were sampled there. Else `many_point_sums` makes dense logits first. A pixel's logits of all masks then lie side by
side, so they are read, and gradients added up, for all at once; with 72 masks a frame this takes a fifth less than
`grid_sample` (LOG.md).

Shapes: G matched queries, S points of a frame, P of them chosen by each query, N objects, C stored channels, with the
constant (or the coverage) as one more; H×W pixels of the map, 4 of them around a point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from train_head.heads.mask_folding import MaskWeights
from train_head.losses.points import LossPoints, choose_uncertain, map_neighbours
from train_head.products import product

# With dense logits: a crowded clip (20 objects × 18 layers) would take 400 MB more, and half as long again.
_MASKS_AT_ONCE = 96


def point_sums(logits_GP: Tensor, labels_GP: Tensor) -> Tensor:
    """What the losses need of the points (..., P) of every map: mean cross-entropy, overlap and area, (3, ...)."""
    return _sums(logits_GP, labels_GP, logits_GP.sigmoid())


def _sums(logits_GP: Tensor, labels_GP: Tensor, probability_GP: Tensor) -> Tensor:
    mask_G = F.binary_cross_entropy_with_logits(logits_GP, labels_GP, reduction="none").mean(dim=-1)
    overlap_G = (probability_GP * labels_GP).sum(dim=-1)
    area_G = probability_GP.sum(dim=-1) + labels_GP.sum(dim=-1)
    return torch.stack([mask_G, overlap_G, area_G])


def few_point_sums(
    weights_GC: Tensor, channels_SC: Tensor, labels_NS: Tensor, object_G: Tensor, points: LossPoints
) -> Tensor:
    """As `point_sums` of the points that each query chooses, differentiable in the weights: (3, G)."""
    sums_3G: Tensor = _FewPointSums.apply(weights_GC, channels_SC, labels_NS, object_G, points)
    return sums_3G


class _FewPointSums(torch.autograd.Function):
    """What the sums change with the weights is one product more: so the channels are not kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, weights_GC: Tensor, channels_SC: Tensor, labels_NS: Tensor, object_G: Tensor, points: LossPoints
    ) -> Tensor:
        logits_GS = product(weights_GC, channels_SC)
        chosen_GP, logits_GP, labels_GP = _at_chosen(logits_GS, labels_NS, object_G, points)
        probability_GP = logits_GP.sigmoid()
        slope_GP = probability_GP * (1 - probability_GP)
        # How each of the three sums changes with a point's logit.
        changes_3GP = torch.stack([(probability_GP - labels_GP) / chosen_GP.shape[1], slope_GP * labels_GP, slope_GP])
        changes_3GS = logits_GS.new_zeros(3, *logits_GS.shape)
        changes_3GS.scatter_(2, chosen_GP.expand(3, -1, -1), changes_3GP)
        ctx.save_for_backward(torch.unflatten(product(changes_3GS.flatten(0, 1), channels_SC.t()), 0, (3, -1)))
        return _sums(logits_GP, labels_GP, probability_GP)

    @staticmethod
    def backward(ctx: Any, gradient_3G: Tensor) -> tuple[Tensor | None, ...]:
        (changes_3GC,) = ctx.saved_tensors
        return (gradient_3G[..., None] * changes_3GC).sum(dim=0), None, None, None, None


def many_point_sums(
    weights: MaskWeights,
    map_RHW: Tensor,
    labels_NS: Tensor,
    object_G: Tensor,
    points: LossPoints,
    frame: int,
    area_hw: tuple[int, int],
) -> Tensor:
    """The same through dense logits of a frame's map, differentiable in the weights (G, R) and in the map: (3, G)."""
    H, W = map_RHW.shape[1:]
    neighbours = map_neighbours(points.points_GS2[frame], area_hw, (H, W))
    groups = (torch.split(each, _MASKS_AT_ONCE) for each in (weights.weights_R, weights.const, object_G))
    sums = []
    for weights_GR, const_G, own_object_G in zip(*groups, strict=True):
        logits_GS = _LogitsAtPoints.apply(weights_GR, const_G, map_RHW.flatten(1), *neighbours)
        sums.append(_ChosenSums.apply(logits_GS, labels_NS, own_object_G, points))
    return torch.cat(sums, dim=1)


class _LogitsAtPoints(torch.autograd.Function):
    """Logits (G, S), bilinear; remembers the map's pixels (R, H·W) as they are stored, in 2 bytes or 1."""

    @staticmethod
    def forward(
        ctx: Any, weights_GR: Tensor, const_G: Tensor, pixels_RN: Tensor, index_S4: Tensor, share_S4: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weights_GR, pixels_RN, index_S4, share_S4)
        if not len(weights_GR):  # on several threads embedding_bag refuses rows of nothing
            return weights_GR.new_zeros(0, len(index_S4))
        dense_GN = product(weights_GR, pixels_RN.to(weights_GR.dtype).t()).add_(const_G[:, None])
        sampled_SG = F.embedding_bag(index_S4, dense_GN.t().contiguous(), per_sample_weights=share_S4, mode="sum")
        return sampled_SG.t().contiguous()

    @staticmethod
    def backward(ctx: Any, gradient_GS: Tensor) -> tuple[Tensor | None, ...]:
        weights_GR, pixels_RN, index_S4, share_S4 = ctx.saved_tensors
        dense_NG = add_up(gradient_GS, index_S4, share_S4, pixels_RN.shape[1])
        wants_weights, wants_const, wants_pixels = ctx.needs_input_grad[:3]
        return (
            product(pixels_RN.to(weights_GR.dtype), dense_NG.t()).t() if wants_weights else None,
            dense_NG.sum(dim=0) if wants_const else None,
            product(weights_GR.t(), dense_NG).to(pixels_RN.dtype) if wants_pixels else None,
            None,
            None,
        )


def add_up(gradient_GS: Tensor, index_S4: Tensor, share_S4: Tensor, num_pixels: int) -> Tensor:
    """What all points give to every pixel (H·W, G): the transpose of the bilinear sum."""
    if not len(gradient_GS):
        return gradient_GS.new_zeros(num_pixels, 0)
    pixel_4S = index_S4.flatten().numpy()
    # NumPy sorts 2-byte integers by counting.
    order_4S = torch.from_numpy(
        np.argsort(pixel_4S.astype(np.uint16 if num_pixels <= 1 << 16 else np.int32), kind="stable")
    )
    count_N = torch.from_numpy(np.bincount(pixel_4S, minlength=num_pixels))
    return F.embedding_bag(
        order_4S >> 2,  # the point, 4 of whose neighbours follow one another
        gradient_GS.t().contiguous(),
        count_N.cumsum(dim=0) - count_N,
        per_sample_weights=share_S4.flatten().index_select(0, order_4S),
        mode="sum",
    )


class _ChosenSums(torch.autograd.Function):
    """The sums at the points that each query chooses, from logits (G, S) at all."""

    @staticmethod
    def forward(ctx: Any, logits_GS: Tensor, labels_NS: Tensor, object_G: Tensor, points: LossPoints) -> Tensor:
        chosen_GP, logits_GP, labels_GP = _at_chosen(logits_GS, labels_NS, object_G, points)
        probability_GP = logits_GP.sigmoid()
        ctx.save_for_backward(chosen_GP.int(), probability_GP, labels_GP)
        ctx.num_points = logits_GS.shape[1]
        return _sums(logits_GP, labels_GP, probability_GP)

    @staticmethod
    def backward(ctx: Any, gradient_3G: Tensor) -> tuple[Tensor | None, ...]:
        chosen_GP, probability_GP, labels_GP = ctx.saved_tensors
        mask_G1, overlap_G1, area_G1 = gradient_3G[..., None]
        gradient_GP = torch.addcmul(area_G1, labels_GP, overlap_G1)
        gradient_GP *= probability_GP * (1 - probability_GP)
        gradient_GP.addcmul_(probability_GP - labels_GP, mask_G1 / chosen_GP.shape[1])
        # In the order in which `add_up` reads it: putting single numbers there is cheaper than turning all of it.
        gradient_GS = gradient_GP.new_zeros(ctx.num_points, len(gradient_GP)).t()
        return gradient_GS.scatter_(1, chosen_GP.long(), gradient_GP), None, None, None


def _at_chosen(
    logits_GS: Tensor, labels_NS: Tensor, object_G: Tensor, points: LossPoints
) -> tuple[Tensor, Tensor, Tensor]:
    """Which points each query takes, and its logits and labels there: (G, P) each."""
    chosen_GP = choose_uncertain(logits_GS, points.num_candidates, points.keep)
    labels_GP = logits_GS.new_empty(chosen_GP.shape)
    for object, chosen_P, labels_P in zip(object_G.tolist(), chosen_GP, labels_GP, strict=True):
        torch.index_select(labels_NS[object], 0, chosen_P, out=labels_P)
    return chosen_GP, logits_GS.gather(1, chosen_GP), labels_GP
