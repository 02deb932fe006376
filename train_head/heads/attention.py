"""Scaled dot-product attention, on the fastest path that there is.

Shapes: N independent passes, H heads, S query tokens, M key tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train_head.products import beats_matmul, product

# Up to so many attention weights on CPU, plain products are faster than PyTorch's fused attention, which knows no
# fast ones in bfloat16 (its backward takes 3 times as long) and gains nothing on small problems.
_PLAIN = {torch.bfloat16: 1 << 24, torch.float32: 1 << 20}
_FEW_THREADS = 2  # head by head, more have too little to share: with 1 the gain is 26 %, with 2 it is 12


def attend_heads(query_NHSD: Tensor, key_NHMD: Tensor, value_NHMD: Tensor) -> Tensor:
    """Scaled dot-product attention of H heads: (N, H, S, D)."""
    N, H, S, D = query_NHSD.shape
    num_weights = N * H * S * key_NHMD.shape[2]
    if query_NHSD.device.type == "cpu" and num_weights <= _PLAIN.get(query_NHSD.dtype, 0):
        weights_NHSM = torch.softmax(query_NHSD * D**-0.5 @ key_NHMD.transpose(2, 3), dim=-1)
        return weights_NHSM @ value_NHMD
    # In this order: torch.compile cannot trace the number of threads.
    if beats_matmul(query_NHSD[0, 0], key_NHMD[0, 0]) and torch.get_num_threads() <= _FEW_THREADS:
        # A head's tokens one after the other, as a product reads them: it would copy what lies otherwise each time.
        query_NHSD, key_NHMD, value_NHMD = (heads.contiguous() for heads in (query_NHSD, key_NHMD, value_NHMD))
        attended_NHSD: Tensor = _HeadByHead.apply(query_NHSD * D**-0.5, key_NHMD, value_NHMD)
        return attended_NHSD
    return F.scaled_dot_product_attention(query_NHSD, key_NHMD, value_NHMD)


class _HeadByHead(torch.autograd.Function):
    """Attention of scaled queries, one head at a time: its weights stay in a CPU's cache, and are computed once more
    for the backward pass rather than kept. PyTorch's fused attention does so too, but multiplies through MKL.
    """

    @staticmethod
    def forward(ctx: Any, query_NHSD: Tensor, key_NHMD: Tensor, value_NHMD: Tensor) -> Tensor:
        ctx.save_for_backward(query_NHSD, key_NHMD, value_NHMD)
        attended_NHSD = _heads_last(query_NHSD)
        for query_SD, key_MD, value_MD, attended_SD in _each_head(query_NHSD, key_NHMD, value_NHMD, attended_NHSD):
            attended_SD.copy_(product(_weights(query_SD, key_MD), value_MD.t()))
        return attended_NHSD

    @staticmethod
    def backward(ctx: Any, gradient_NHSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = ctx.saved_tensors
        results = tuple(_heads_last(tensor) for tensor in given)
        for query_SD, key_MD, value_MD, gradient_SD, *result in _each_head(
            *given, gradient_NHSD.contiguous(), *results
        ):
            weights_SM = _weights(query_SD, key_MD)
            changes_SM = product(gradient_SD, value_MD)
            changes_SM = torch._softmax_backward_data(changes_SM, weights_SM, -1, changes_SM.dtype)
            result[0].copy_(product(changes_SM, key_MD.t()))
            # The smaller operand first: oneDNN copies that one where it is transposed.
            result[1].copy_(product(query_SD.t(), changes_SM.t()).t())
            result[2].copy_(product(gradient_SD.t(), weights_SM.t()).t())
        return results[0], results[1], results[2]


def _weights(query_SD: Tensor, key_MD: Tensor) -> Tensor:
    return torch.softmax(product(query_SD, key_MD), dim=-1)


def _heads_last(like_NHSD: Tensor) -> Tensor:
    """An empty tensor of that shape which lies in memory as tokens (N, S, H·D), as projections read and write them."""
    return torch.empty_like(like_NHSD.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _each_head(*tensors_NHSD: Tensor) -> Iterable[tuple[Tensor, ...]]:
    heads = ([head_SD for heads_HSD in tensor for head_SD in heads_HSD.unbind()] for tensor in tensors_NHSD)
    return zip(*heads, strict=True)
