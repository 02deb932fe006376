"""Bipartite matching of video queries with objects (VITA §3.3, Mask2Former §3.3).

Shapes: B clips, T frames, N objects, V video queries, D decoder and L detector layers, G = D·L·V queries of
all layers, P sampled points, R stored channels.
Costs: 2 · (−probability of the class) + 5 · mask cross-entropy + 5 · dice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from configs.schema import PaddedArea
from train_head.losses.mask_folding import MaskWeights
from train_head.losses.points import PointSource, sample_map, sample_masks, sampling_area
from train_head.losses.targets import ClipTargets
from train_head.products import product


@dataclass(frozen=True, kw_only=True)
class CostWeights:
    """Weights of the three matching costs."""

    label: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


@dataclass(frozen=True, kw_only=True)
class ClipMatch:
    """The matches of one clip for every detector and decoder layer; M = min(V, N) pairs each."""

    query_DLM: Tensor  # int64
    object_DLM: Tensor  # int64, ascending


_CHUNK_LOGITS = 1 << 19  # logits alive at once: small enough for a CPU's cache, large enough for its matmul
_CHUNK_LOGITS_CUDA = 1 << 27
_FACTORS = 64  # of numbers in [0.5, 1], whose product float32 can hold


def point_costs(
    weights_GR: Tensor,
    channels_TPR: Iterable[Tensor],
    targets_NTP: Tensor,
    weights: CostWeights,
    logit_type: torch.dtype = torch.float32,
) -> Tensor:
    """Mask and dice costs (G, N) of one problem from its channels, sampled at P points, frame by frame.

    `weights_GR` and `channels_TPR` (T of (P, R)) carry the constant and the coverage as their last channel.
    With x the logits and t the targets at a point, cross-entropy is softplus(x) − x·t, and
    softplus(x) = (x + |x|) / 2 − log σ(|x|). All that is linear in x comes from sums of the channels; every
    logit is visited for |x| and σ(x) only, in groups that stay in a CPU's cache. `logit_type` is the precision of
    the product that makes the logits; all that follows is float32.
    """
    if weights_GR.is_cuda:  # all frames' points at once: few launches
        channels_TPR, targets_NTP = [torch.cat(tuple(channels_TPR))], targets_NTP.flatten(1)[:, None]
    G, (N, T, P) = len(weights_GR), targets_NTP.shape
    # One more target that is 1 everywhere sums the probabilities (for dice) and the logits (for softplus).
    columns_TNP = F.pad(targets_NTP.transpose(0, 1), (0, 0, 0, 1), value=1.0)
    overlap_GN = weights_GR.new_zeros(G, N + 1)
    typed_GR = weights_GR.to(logit_type)
    channel_sums_NR = weights_GR.new_zeros(N + 1, weights_GR.shape[1])
    positive_G = weights_GR.new_zeros(G)
    chunk = (_CHUNK_LOGITS_CUDA if weights_GR.is_cuda else _CHUNK_LOGITS) // max(1, G)
    step = max(1, chunk // _FACTORS) * _FACTORS
    for channels_PR, columns_NP in zip(channels_TPR, columns_TNP, strict=True):
        channel_sums_NR += columns_NP @ channels_PR
        for start in range(0, P, step):
            part = slice(start, start + step)
            logits_GP = product(typed_GR, channels_PR[part].to(logit_type)).float()
            probability_GP = logits_GP.sigmoid()
            overlap_GN += (columns_NP[:, part] @ probability_GP.t()).t()
            positive_G += logits_GP.abs_().sum(dim=1) / 2
            # σ(|x|) = ½ + |σ(x) − ½| spares a second exponential.
            positive_G -= _sum_of_logs(probability_GP.sub_(0.5).abs_().add_(0.5))
    linear_GN = weights_GR @ channel_sums_NR.t()
    softplus_G1 = positive_G[:, None] + linear_GN[:, -1:] / 2
    mask_GN = (softplus_G1 - linear_GN[:, :-1]) / (T * P)
    total_GN = overlap_GN[:, -1:] + targets_NTP.sum(dim=(1, 2))
    dice_GN = 1 - (2 * overlap_GN[:, :-1] + 1) / (total_GN + 1)
    return weights.mask * mask_GN + weights.dice * dice_GN


def _sum_of_logs(values_GP: Tensor) -> Tensor:
    """Σ log v (G) of numbers in [0.5, 1]: logarithms of products, since a logarithm costs 20 multiplications."""
    whole = values_GP.shape[1] // _FACTORS * _FACTORS
    products_GF = torch.unflatten(values_GP[:, :whole], 1, (-1, _FACTORS)).prod(dim=2)
    return products_GF.log_().sum(dim=1) + values_GP[:, whole:].log().sum(dim=1)


@torch.no_grad()
def match_clips(
    class_logits_DLBVK: Tensor,
    mask_weights: MaskWeights,
    maps: Sequence[Tensor],
    targets: Sequence[ClipTargets],
    points: Sequence[PointSource],
    *,
    cost_weights: CostWeights,
    padded_area: PaddedArea,
    logit_type: torch.dtype = torch.float32,
) -> tuple[ClipMatch, ...]:
    """Match every clip for every layer. `maps`: B stored maps (T, R, H, W), of any sizes.

    Only the features are sampled, once per clip for all D·L·V queries; labels are read at the points.
    VITA: the release draws points for every (layer, clip) problem anew; here the layers of a clip share them.
    """
    D, L, _, V, _ = class_logits_DLBVK.shape
    probabilities_DLBVK = class_logits_DLBVK.float().softmax(dim=-1)
    stacked_DLBVR = mask_weights.stacked()
    costs = []
    for clip, (map_TRHW, target, source) in enumerate(zip(maps, targets, points, strict=True)):
        if target.num_objects == 0:
            costs.append(probabilities_DLBVK.new_empty(D, L, V, 0))
            continue
        area_hw = sampling_area(target.image_hw, (map_TRHW.shape[2], map_TRHW.shape[3]), padded_area)
        points_1P2 = source.matching_points(map_TRHW.device)[None]
        channels_TPR = sample_map(map_TRHW, points_1P2, area_hw)
        targets_NTP = _masks_at(target, points_1P2, area_hw)
        weights_GR = stacked_DLBVR[:, :, clip].flatten(0, 2)
        cost_GN = point_costs(weights_GR, channels_TPR, targets_NTP, cost_weights, logit_type)
        class_DLVN = probabilities_DLBVK[:, :, clip][..., target.labels_N]
        costs.append(cost_GN.view(D, L, V, -1) - cost_weights.label * class_DLVN)
    return tuple(ClipMatch(query_DLM=query, object_DLM=chosen) for query, chosen in assign(costs))


def _masks_at(target: ClipTargets, points_1P2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Label values at points shared by all frames: (N, T, P)."""
    masks_Ghw = target.masks_NThw.flatten(0, 1)
    every = torch.arange(len(masks_Ghw), device=masks_Ghw.device)
    return sample_masks(masks_Ghw, every, points_1P2, area_hw).view(*target.present_NT.shape, -1)


def assign(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Solve stacks of assignment problems (..., V, N) with one copy to the host and one back.

    Returns per stack the matched rows and columns, the latter ascending: both (..., min(V, N)) on the costs'
    device.
    Raises FloatingPointError where a cost is not finite (the index says which stack, that is which clip).
    """
    flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    solved: list[NDArray[np.int64]] = []
    start = 0
    for index, cost in enumerate(costs):
        V, N = cost.shape[-2:]
        problems = flat[start : start + cost.numel()].reshape(cost.shape[:-2].numel(), V, N)
        start += cost.numel()
        if not np.isfinite(problems).all():
            raise FloatingPointError(f"matching costs of clip {index} of the batch are not finite")
        pairs = [linear_sum_assignment(problem.T)[::-1] for problem in problems]
        solved.append(np.array(pairs, dtype=np.int64).reshape(*cost.shape[:-2], 2, min(V, N)))
    joined = torch.from_numpy(np.concatenate([pairs.reshape(-1) for pairs in solved])).to(costs[0].device)
    numbers = torch.split(joined, [pairs.size for pairs in solved])
    rows_columns = [part.view(pairs.shape).unbind(-2) for part, pairs in zip(numbers, solved, strict=True)]
    return [(rows, columns) for rows, columns in rows_columns]
