"""Products through oneDNN against PyTorch's own, forward and backward."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_head import products
from train_head.products import Linear, feed_forward, has_bfloat16, linear, product


def inputs(leading: tuple[int, ...], num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(*leading, num_inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    return tokens, weight, torch.randn(num_outputs, generator=generator, dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["MKL", "oneDNN"], autouse=True)
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever library this machine would take, both are tested."""
    monkeypatch.setattr(products, "_MKL_AHEAD", request.param)


def test_the_library_that_uses_the_full_width_is_taken() -> None:
    """As measured; see the module's head."""
    xeon, zen_3, zen_5, arm = (
        "vendor_id : GenuineIntel\nflags : avx2 avx512f",
        "vendor_id : AuthenticAMD\nflags : fma avx2",
        "vendor_id : AuthenticAMD\nflags : fma avx2 avx512f",
        "Features : asimd",
    )
    assert [products._is_mkl_ahead(info) for info in (xeon, zen_3, zen_5, arm)] == [True, True, False, False]


@pytest.mark.parametrize(("leading", "sizes"), [((2, 3, 50), (64, 128)), ((300,), (257, 90)), ((2, 3), (4, 5))])
def test_linear_and_its_gradients(leading: tuple[int, ...], sizes: tuple[int, int]) -> None:
    """Above and below the size where oneDNN is taken; the reference is float64."""
    exact = [tensor.requires_grad_() for tensor in inputs(leading, *sizes)]
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    expected, actual = F.linear(*exact), linear(*ours)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected.backward(gradient)
    actual.backward(gradient.float())
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-3)


def test_strided_operands_without_bias() -> None:
    tokens, weight, _ = inputs((400,), 64, 90)
    rows, columns = tokens.float().t().contiguous().t(), weight.float().t().contiguous().t()
    torch.testing.assert_close(product(rows, columns).double(), tokens @ weight.t(), rtol=1e-4, atol=1e-4)
    cut = F.pad(tokens.float(), (0, 3))[:, :64]
    torch.testing.assert_close(product(cut, columns).double(), tokens @ weight.t(), rtol=1e-4, atol=1e-4)


def test_frozen_operands_get_no_gradient() -> None:
    tokens, weight, _ = (tensor.float() for tensor in inputs((400,), 64, 90))
    weight.requires_grad_()
    linear(tokens, weight).sum().backward()
    assert tokens.grad is None and weight.grad is not None


def test_autocast_takes_its_own_path() -> None:
    tokens, weight, bias = (tensor.float() for tensor in inputs((400,), 64, 90))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(tokens, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("num_tokens", [3, 400])
def test_feed_forward_and_its_gradients(num_tokens: int) -> None:
    """Below and above the size where oneDNN is taken; the reference is float64."""
    torch.manual_seed(3)
    layers = Linear(64, 128), Linear(128, 32)
    tokens = inputs((2, num_tokens), 64, 1)[0].float().requires_grad_()
    operands = [tokens, *layers[0].parameters(), *layers[1].parameters()]
    exact = [tensor.detach().double().requires_grad_() for tensor in operands]
    expected = F.linear(F.relu(F.linear(*exact[:3])), *exact[3:])
    actual = feed_forward(tokens, *layers)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected.backward(gradient)
    actual.backward(gradient.float())
    for one, other in zip(operands, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-3)


def test_half_precision_is_known_to_be_emulated_or_not() -> None:
    """Against the processor's own list: bfloat16 through oneDNN takes AVX-512."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if platform.machine() != "x86_64" or "avx_ne_convert" in flags:
        pytest.skip("the words are those of x86 processors of 2017 to 2024")
    assert has_bfloat16(torch.device("cpu")) == ({"avx512bw", "avx512vl", "avx512dq"} <= flags)
    assert has_bfloat16(torch.device("cuda"))
