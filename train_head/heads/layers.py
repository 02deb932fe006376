"""Transformer blocks of the head: post-norm, no dropout, batch first (VITA §3.2).

Shapes: N independent passes, S query tokens, M key tokens, C channels.
Parameter names are those of the released weights.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_head.heads.attention import attend_heads
from train_head.products import Linear, feed_forward, linear


class MultiheadAttention(nn.Module):
    """Attention with the parameter layout of `torch.nn.MultiheadAttention` (q, k, v in one matrix)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, tokens_NSC: Tensor, first: int, count: int = 1) -> Tensor:
        """Project tokens with `count` of the stacked matrices, from `first` (0 query, 1 key, 2 value); to infer."""
        rows = slice(first * self.dim, (first + count) * self.dim)
        return linear(tokens_NSC, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def matrices(self, *counts: int) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of the stacked matrices, some together, for `linear`.

        Cut at once: the gradients of slices would each fill the whole of a stack with zeros and be added up.
        """
        sizes = [count * self.dim for count in counts]
        return list(zip(torch.split(self.in_proj_weight, sizes), torch.split(self.in_proj_bias, sizes), strict=True))

    def attend(self, query_NSC: Tensor, key_NMC: Tensor, value_NMC: Tensor) -> Tensor:
        """Scaled dot-product attention of projected tokens, before the output projection: (N, S, C)."""
        query, key, value = (
            torch.unflatten(tokens, -1, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (query_NSC, key_NMC, value_NMC)
        )
        return attend_heads(query, key, value).transpose(1, 2).flatten(2)


class SelfAttentionLayer(nn.Module):
    """Residual self-attention followed by a LayerNorm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens_NSC: Tensor, position_SC: Tensor) -> Tensor:
        """Attend among S tokens; queries and keys carry the position, values do not: (N, S, C)."""
        attention = self.self_attn
        query_key, value = attention.matrices(2, 1)
        query, key = linear(tokens_NSC + position_SC, *query_key).chunk(2, dim=-1)
        attended = attention.attend(query, key, linear(tokens_NSC, *value))
        residual: Tensor = self.norm(tokens_NSC + attention.out_proj(attended))
        return residual

    def forward_runs(self, frames_NTQC: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
        """Attend within groups of consecutive frames, without position: (N, T, Q, C).

        `runs` lists (frames per group, number of groups) along T; a group sees only itself. Groups of one
        length share one call, so that neither padding nor a mask is ever needed.
        """
        N, T, Q, C = frames_NTQC.shape
        attention = self.self_attn
        projected = linear(frames_NTQC, attention.in_proj_weight, attention.in_proj_bias)
        starts = [0]
        for length, count in runs:
            starts.append(starts[-1] + length * count)
        assert starts[-1] == T, f"groups cover {starts[-1]} of {T} frames"
        parts = []
        for (length, count), (start, stop) in zip(runs, pairwise(starts), strict=True):
            group = projected[:, start:stop].reshape(N * count, length * Q, 3 * C)
            parts.append(attention.attend(*group.chunk(3, dim=-1)).view(N, length * count, Q, C))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        residual: Tensor = self.norm(frames_NTQC + attention.out_proj(attended))
        return residual


class CrossAttentionLayer(nn.Module):
    """Residual cross-attention followed by a LayerNorm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, query_NSC: Tensor, position_SC: Tensor, keys_NMC: Tensor, values_NMC: Tensor) -> Tensor:
        """Attend from S queries to M tokens (`keys` = tokens with position, `values` without): (N, S, C)."""
        attention = self.multihead_attn
        query, key, value = attention.matrices(1, 1, 1)
        attended = attention.attend(
            linear(query_NSC + position_SC, *query), linear(keys_NMC, *key), linear(values_NMC, *value)
        )
        residual: Tensor = self.norm(query_NSC + attention.out_proj(attended))
        return residual


class FeedForwardLayer(nn.Module):
    """Residual two-layer perceptron followed by a LayerNorm."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = Linear(dim, hidden_dim)
        self.linear2 = Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (..., C) one by one."""
        residual: Tensor = self.norm(tokens + feed_forward(tokens, self.linear1, self.linear2))
        return residual


class Perceptron(nn.Module):
    """Linear layers with ReLU in between (the mask embedding has three)."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(inner, outer) for inner, outer in pairwise(dims))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., dims[0]) to (..., dims[-1])."""
        for layer in self.layers[:-1]:
            tokens = F.relu(layer(tokens))
        result: Tensor = self.layers[-1](tokens)
        return result


def window_runs(num_frames: int, window: int, shifted: bool) -> tuple[tuple[int, int], ...]:
    """Split T frames into attention groups; returns runs of (frames per group, number of groups).

    Equals the release's pad, roll and mask: rolling by ceil(W/2) and forbidding the wrapped half to see the other
    leaves a first group of floor(W/2) frames, then windows of W, then what is left. Window 0 means one group of all
    frames.
    """
    if window == 0:
        return ((num_frames, 1),)
    first = min(window // 2, num_frames) if shifted else 0
    full = (num_frames - first) // window  # no divmod: torch.compile has none of numbers that vary
    rest = num_frames - first - full * window
    return tuple((length, count) for length, count in ((first, 1), (window, full), (rest, 1)) if length * count)
