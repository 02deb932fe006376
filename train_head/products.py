"""Matrix products of float32 on CPU through the library that uses a processor's full vector width.

PyTorch's own `linear` and `matmul` go to MKL, which on AMD processors with AVX-512 runs at half the width: 90 GFLOP/s
against oneDNN's 200 on one Zen 5 core. On those without AVX-512 it is some 15 % ahead of oneDNN (90 against 76 on
Zen 3), on Intel's 6 % (185 against 170 on a Xeon with AMX), but only oneDNN has a ReLU within the product.

Shapes: S rows (tokens), I inputs, O outputs of a linear map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn,
    "_linear_pointwise",  # not part of PyTorch's public interface
)
_HALF_KNOWN: bool = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")  # not public either
_CPU_INFO = Path("/proc/cpuinfo")
_SMALLEST = 1 << 21  # multiplications: below this the detour costs more than it saves


def _is_mkl_ahead(cpu_info: str) -> bool:
    return "GenuineIntel" in cpu_info or ("avx2" in cpu_info and "avx512f" not in cpu_info)


_MKL_AHEAD = _CPU_INFO.is_file() and _is_mkl_ahead(_CPU_INFO.read_text())


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth anything there: a CPU without AVX-512 emulates it, 20 times slower than float32."""
    return device.type != "cpu" or not _HALF_KNOWN or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def beats_matmul(rows_SI: Tensor, weight_OI: Tensor) -> bool:
    """Whether `product` is faster here than what PyTorch's own operations multiply with."""
    return not _MKL_AHEAD and _worthwhile(rows_SI, weight_OI)


def product(rows_SI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return rows · weightᵀ (S, O), on the fastest path that there is; not differentiable on CPU."""
    if _worthwhile(rows_SI, weight_OI):
        return _multiply(rows_SI, weight_OI)
    return rows_SI @ weight_OI.mT


def linear(tokens: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Same as `torch.nn.functional.linear`, with gradients."""
    if not _worthwhile(tokens, weight_OI):
        return F.linear(tokens, weight_OI, bias_O)
    outputs_SO: Tensor = _Linear.apply(tokens.flatten(0, -2), weight_OI, bias_O)
    return outputs_SO.view(*tokens.shape[:-1], -1)


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return linear(tokens, self.weight, self.bias)


def feed_forward(tokens: Tensor, inner: Linear, outer: Linear) -> Tensor:
    """Return `outer(relu(inner(tokens)))`; on CPU the ReLU costs no pass and no second copy of the hidden numbers."""
    if not _worthwhile(tokens, inner.weight):
        return outer(F.relu(inner(tokens)))  # type: ignore[no-any-return]
    outputs_SO: Tensor = _FeedForward.apply(tokens.flatten(0, -2), inner.weight, inner.bias, outer.weight, outer.bias)
    return outputs_SO.view(*tokens.shape[:-1], -1)


def _worthwhile(tokens: Tensor, weight_OI: Tensor) -> bool:
    return (
        tokens.device.type == "cpu"
        and tokens.dtype == weight_OI.dtype == torch.float32
        and tokens.numel() * weight_OI.shape[0] >= _SMALLEST
        and _AVAILABLE
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _multiply(rows_SI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return rows · weightᵀ + bias (S, O), without gradients."""
    if not _MKL_AHEAD:
        return _onednn(rows_SI, weight_OI, bias_O)
    return rows_SI @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, rows_SI, weight_OI.t())


def _onednn(rows_SI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, then: str = "none") -> Tensor:
    """The kernel behind compiled linear layers, without gradients; `then` may be "relu"."""
    product_SO: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(rows_SI), _dense(weight_OI), bias_O, then, [], "")
    return product_SO


def _dense(matrix: Tensor) -> Tensor:
    """Copy a cut-out of a larger matrix: for one, oneDNN falls back to a kernel 50 times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_SI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens_SI, weight_OI)
        return _multiply(tokens_SI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tokens_SI, weight_OI = ctx.saved_tensors
        wants_tokens, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _multiply(gradient_SO, weight_OI.t()) if wants_tokens else None,
            _weight_gradient(gradient_SO, tokens_SI) if wants_weight else None,
            gradient_SO.sum(dim=0) if wants_bias else None,
        )


def _weight_gradient(gradient_SO: Tensor, tokens_SI: Tensor) -> Tensor:
    """gradientᵀ · tokens (O, I). oneDNN copies its first operand where that is transposed: the smaller one, then."""
    if gradient_SO.shape[1] <= tokens_SI.shape[1]:
        return _multiply(gradient_SO.t(), tokens_SI.t())
    return _multiply(tokens_SI.t(), gradient_SO.t()).t()


class _FeedForward(torch.autograd.Function):
    """Two linear layers with a ReLU between them (S tokens of I numbers, J hidden, O outputs)."""

    @staticmethod
    def forward(
        ctx: Any, tokens_SI: Tensor, inner_JI: Tensor, inner_J: Tensor, outer_OJ: Tensor, outer_O: Tensor
    ) -> Tensor:
        hidden_SJ = _onednn(tokens_SI, inner_JI, inner_J, "relu")
        ctx.save_for_backward(tokens_SI, inner_JI, hidden_SJ, outer_OJ)
        return _multiply(hidden_SJ, outer_OJ, outer_O)

    @staticmethod
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor | None, ...]:
        tokens_SI, inner_JI, hidden_SJ, outer_OJ = ctx.saved_tensors
        outer_gradient_OJ = _weight_gradient(gradient_SO, hidden_SJ)
        hidden_gradient_SJ = _multiply(gradient_SO, outer_OJ.t())
        torch.ops.aten.threshold_backward.grad_input(hidden_gradient_SJ, hidden_SJ, 0, grad_input=hidden_gradient_SJ)
        return (
            _multiply(hidden_gradient_SJ, inner_JI.t()) if ctx.needs_input_grad[0] else None,
            _weight_gradient(hidden_gradient_SJ, tokens_SI),
            hidden_gradient_SJ.sum(dim=0),
            outer_gradient_OJ,
            gradient_SO.sum(dim=0),
        )
