"""Bipartite matching of queries with objects (VITA §3.3, Mask2Former §3.3).

Shapes: T frames, N objects, V video queries, D decoder and L detector layers, G = D·L·V queries of all layers,
P sampled points, R stored channels.
Costs: 2 · (−probability of the class) + 5 · mask cross-entropy + 5 · dice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from train_head.products import product


@dataclass(frozen=True, kw_only=True)
class CostWeights:
    """Weights of the three matching costs."""

    label: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


@dataclass(frozen=True, kw_only=True)
class ClipMatch:
    """The matches of one clip for every detector and decoder layer, on the host; M = min(V, N) pairs each."""

    query_DLM: Tensor  # int64
    object_DLM: Tensor  # int64, ascending


_CHUNK_LOGITS = 1 << 19  # logits alive at once: small enough for a CPU's cache, large enough for its matmul
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
    G, (N, T, P) = len(weights_GR), targets_NTP.shape
    # One more target that is 1 everywhere sums the probabilities (for dice) and the logits (for softplus).
    columns_TNP = F.pad(targets_NTP.transpose(0, 1), (0, 0, 0, 1), value=1.0)
    overlap_GN = weights_GR.new_zeros(G, N + 1)
    typed_GR = weights_GR.to(logit_type)
    channel_sums_NR = weights_GR.new_zeros(N + 1, weights_GR.shape[1])
    positive_G = weights_GR.new_zeros(G)
    step = max(1, _CHUNK_LOGITS // max(1, G) // _FACTORS) * _FACTORS
    for channels_PR, columns_NP in zip(channels_TPR, columns_TNP, strict=True):
        channel_sums_NR += product(columns_NP, channels_PR.t())
        for start in range(0, P, step):
            part = slice(start, start + step)
            logits_GP = product(typed_GR, channels_PR[part].to(logit_type)).float()
            probability_GP = logits_GP.sigmoid()
            overlap_GN += (columns_NP[:, part] @ probability_GP.t()).t()
            positive_G += logits_GP.abs_().sum(dim=1) / 2
            # σ(|x|) = ½ + |σ(x) − ½| spares a second exponential.
            positive_G -= _sum_of_logs(probability_GP.sub_(0.5).abs_().add_(0.5))
    linear_GN = weights_GR @ channel_sums_NR.t()
    return costs_of_sums(linear_GN, overlap_GN, positive_G, targets_NTP.sum(dim=(1, 2)), T * P, weights)


def costs_of_sums(
    linear_GN: Tensor, overlap_GN: Tensor, positive_G: Tensor, areas_N: Tensor, num_points: int, weights: CostWeights
) -> Tensor:
    """Costs (..., G, N) from sums over all points, with "1 everywhere" as the last column of the first two.

    Of logits times targets, of probabilities times targets, of |x| / 2 − log σ(|x|), of the targets alone.
    """
    softplus_G1 = positive_G[..., None] + linear_GN[..., -1:] / 2
    mask_GN = (softplus_G1 - linear_GN[..., :-1]) / num_points
    total_GN = overlap_GN[..., -1:] + areas_N[..., None, :]
    dice_GN = 1 - (2 * overlap_GN[..., :-1] + 1) / (total_GN + 1)
    return weights.mask * mask_GN + weights.dice * dice_GN


def _sum_of_logs(values_GP: Tensor) -> Tensor:
    """Σ log v (G) of numbers in [0.5, 1]: logarithms of products, since a logarithm costs 20 multiplications."""
    whole = values_GP.shape[1] // _FACTORS * _FACTORS
    products_GF = torch.unflatten(values_GP[:, :whole], 1, (-1, _FACTORS)).prod(dim=2)
    return products_GF.log_().sum(dim=1) + values_GP[:, whole:].log().sum(dim=1)


def assign(costs: Sequence[NDArray[Any]], first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Solve stacks of assignment problems (..., V, N).

    Returns per stack the matched rows and columns, the latter ascending: both (..., min(V, N)), on the host.
    Raises FloatingPointError where a cost is not finite; it says which stack, that is which clip, from `first` on.
    """
    solved = []
    for index, cost in enumerate(costs, first):
        V, N = cost.shape[-2:]
        if not np.isfinite(cost).all():
            raise FloatingPointError(f"matching costs of clip {index} of the batch are not finite")
        problems = cost.reshape(math.prod(cost.shape[:-2]), V, N)
        pairs = [linear_sum_assignment(problem.T)[::-1] for problem in problems]
        joined = torch.from_numpy(np.array(pairs, dtype=np.int64).reshape(*cost.shape[:-2], 2, min(V, N)))
        rows, columns = joined.unbind(-2)
        solved.append((rows, columns))
    return solved
