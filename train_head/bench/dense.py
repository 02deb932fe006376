"""The published losses, implemented the plain way: what `python -m train_head bench` measures ours against.

Written for the benchmark from VITA §3.3, Mask2Former §3.3, PointRend and the release's settings. Every query of every
layer gets a dense logit map with gradients, labels become padded floats, and every (decoder layer, detector layer,
clip) is its own matching problem with its own points.

Shapes: T frames, V video queries, N objects, M matched objects, P points, C map channels, L detector layers,
D decoder layers, H×W the stride-4 map, h×w the padded canvas (4H×4W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from train_head.heads.contract import HeadOutputs, TrackHead
from train_head.losses.criterion import LossNormalisers, LossWeights
from train_head.losses.points import STRIDE, LossPoints, PointConfig, PointSource
from train_head.losses.targets import ClipTargets


def point_sample(maps_GHW: Tensor, points_GP2: Tensor) -> Tensor:
    """Values (G, P) at points in [0, 1] of the canvas."""
    return F.grid_sample(maps_GHW[:, None], 2 * points_GP2[:, None] - 1, align_corners=False)[:, 0, 0]


class PlainPoints:
    """Points as published: new ones for every problem, the most uncertain by `topk` over all maps at once."""

    def __init__(self, config: PointConfig, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=self.generator, device=self.generator.device)

    def matching_points(self, device: torch.device) -> Tensor:
        """Uniform points (P, 2)."""
        return self._uniform(self.config.matching).to(device)

    def loss_points(self, count: int, device: torch.device) -> LossPoints:
        """Points of `count` masks, each with its own."""
        config = self.config
        keep, candidates = int(config.loss * config.uncertain), int(config.loss * config.oversample)
        points_GS2 = self._uniform(count, candidates + config.loss - keep).to(device)
        return LossPoints(points_GS2=points_GS2, num_candidates=candidates, keep=keep)


@torch.no_grad()
def uncertain_points(logits_GHW: Tensor, source: PointSource) -> Tensor:
    """Mostly uncertain points (G, P, 2) of the canvas."""
    points = source.loss_points(len(logits_GHW), logits_GHW.device)
    candidates, fresh = points.points_GS2[:, : points.num_candidates], points.points_GS2[:, points.num_candidates :]
    if points.keep == 0:
        return fresh
    nearest = (-point_sample(logits_GHW, candidates).abs()).topk(points.keep, dim=1).indices
    return torch.cat([candidates.gather(1, nearest[..., None].expand(-1, -1, 2)), fresh], dim=1)


@dataclass(frozen=True, kw_only=True)
class DenseLosses:
    """Unweighted sums of the terms over all layers and clips, normalised, and the weighted total."""

    label: Tensor
    mask: Tensor
    dice: Tensor
    similarity: Tensor
    total: Tensor


def dense_losses(
    head: TrackHead,
    outputs: HeadOutputs,
    maps: Sequence[Tensor],
    targets: Sequence[ClipTargets],
    points: Sequence[PointSource],
    normalisers: LossNormalisers,
    weights: LossWeights = LossWeights(),  # noqa: B008 (frozen)
) -> DenseLosses:
    """Losses of the outputs on uncompressed maps (T, C, H, W), padding counted as background."""
    zero = outputs.class_logits_DLBVK.new_zeros((), dtype=torch.float32)
    label, mask, dice, similarity = zero, zero, zero, zero
    for clip, (map_TCHW, target, source) in enumerate(zip(maps, targets, points, strict=True)):
        features_TCHW = head.vita_mask_features(map_TCHW.to(head.vita_mask_features.weight.dtype))
        masks_NThw = _padded(target, (features_TCHW.shape[2], features_TCHW.shape[3]))
        D, L = outputs.class_logits_DLBVK.shape[:2]
        for depth in range(D):
            embed_LVC = outputs.mask_embed_DLBVC[depth, :, clip]
            logits_LVTHW = torch.einsum("lvc,tchw->lvthw", embed_LVC.float(), features_TCHW.float())
            for layer in range(L):
                classes_VK = outputs.class_logits_DLBVK[depth, layer, clip].float()
                logits_VTHW = logits_LVTHW[layer]
                rows, columns = match(classes_VK, logits_VTHW, target.labels_N, masks_NThw, source, weights)
                label = label + _class_loss(classes_VK, target.labels_N, rows, columns, weights)
                mask_term, dice_term = _mask_losses(logits_VTHW[rows], masks_NThw[columns], source)
                mask, dice = mask + mask_term, dice + dice_term
                if depth == D - 1:
                    similarity = similarity + _similarity(outputs, target, layer, clip, rows, columns)
    num_masks = normalisers.num_masks.clamp(min=1)
    label, mask, dice = label / normalisers.class_weight, mask / num_masks, dice / num_masks
    similarity = similarity / normalisers.similarity_pairs
    total = weights.label * label + weights.mask * mask + weights.dice * dice + weights.similarity * similarity
    return DenseLosses(label=label, mask=mask, dice=dice, similarity=similarity, total=total)


def _padded(target: ClipTargets, map_hw: tuple[int, int]) -> Tensor:
    h, w = target.image_hw
    return F.pad(target.masks_NThw.float(), (0, map_hw[1] * STRIDE - w, 0, map_hw[0] * STRIDE - h))


@torch.no_grad()
def match(
    classes_VK: Tensor,
    logits_VTHW: Tensor,
    labels_N: Tensor,
    masks_NThw: Tensor,
    source: PointSource,
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """Solve one matching problem: indices of queries and objects, on the host as the labels are."""
    V, T = logits_VTHW.shape[:2]
    N = len(labels_N)
    points_P2 = source.matching_points(logits_VTHW.device)
    x = point_sample(logits_VTHW.flatten(0, 1), points_P2.expand(V * T, -1, -1)).view(V, -1)
    t = point_sample(masks_NThw.flatten(0, 1), points_P2.expand(N * T, -1, -1)).view(N, -1)
    positive, negative = F.softplus(-x), F.softplus(x)
    mask_VN = (positive @ t.t() + negative @ (1 - t).t()) / x.shape[1]
    p = x.sigmoid()
    dice_VN = 1 - (2 * p @ t.t() + 1) / (p.sum(dim=1)[:, None] + t.sum(dim=1) + 1)
    class_VN = -classes_VK.softmax(dim=-1)[:, labels_N]
    cost_VN = weights.label * class_VN + weights.mask * mask_VN + weights.dice * dice_VN
    rows, columns = linear_sum_assignment(cost_VN.cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def _class_loss(classes_VK: Tensor, labels_N: Tensor, rows: Tensor, columns: Tensor, weights: LossWeights) -> Tensor:
    V, num_labels = classes_VK.shape
    wanted_V = torch.full((V,), num_labels - 1)
    wanted_V[rows] = labels_N[columns]
    weight_K = torch.ones(num_labels, device=classes_VK.device)
    weight_K[-1].fill_(weights.no_object)
    return F.cross_entropy(classes_VK, wanted_V.to(classes_VK.device), weight_K, reduction="sum")


def _mask_losses(logits_MTHW: Tensor, masks_MThw: Tensor, source: PointSource) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and dice over the matched objects of one problem."""
    M = len(logits_MTHW)
    points_GP2 = uncertain_points(logits_MTHW.detach().flatten(0, 1), source)
    x = point_sample(logits_MTHW.flatten(0, 1), points_GP2).view(M, -1)
    t = point_sample(masks_MThw.flatten(0, 1), points_GP2).view(M, -1)
    mask = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(dim=1).sum()
    p = x.sigmoid()
    dice_M = 1 - (2 * (p * t).sum(dim=1) + 1) / (p.sum(dim=1) + t.sum(dim=1) + 1)
    return mask, dice_M.sum()


def _similarity(
    outputs: HeadOutputs, target: ClipTargets, layer: int, clip: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Sum over all pairs of matched frame and video queries of one (layer, clip)."""
    frames_LBTQC, clips_LBVC = outputs.frame_similarity_LBTQC, outputs.clip_similarity_LBVC
    assert frames_LBTQC is not None and clips_LBVC is not None and target.frame_queries_LTN is not None
    embeddings, identities = [clips_LBVC[layer, clip][rows]], [columns]
    for frame, queries_N in enumerate(target.frame_queries_LTN[layer]):
        present_N = (queries_N >= 0).nonzero().flatten()
        embeddings.append(frames_LBTQC[layer, clip, frame][queries_N[present_N]])
        identities.append(present_N)
    embeddings_SC, identities_S = torch.cat(embeddings).float(), torch.cat(identities)
    same_SS = (identities_S[:, None] == identities_S[None]).float().to(embeddings_SC.device)
    return F.binary_cross_entropy_with_logits(embeddings_SC @ embeddings_SC.t(), same_SS, reduction="sum")
