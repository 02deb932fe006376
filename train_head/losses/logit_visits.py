"""What the matching does with every one of its logits, as one kernel where there is a compiler for the device.

A step at real size matches over 10⁹ logits: what reads them once more takes 2 ms of an H100 (4 GB in float32).

Shapes: F frames, G queries of all layers, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cache.errors import first_line
from cache.progress import say

Visit = Callable[[Tensor], tuple[Tensor, Tensor]]


def visit_logits(logits_FGP: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (F, G, P) of logits of any float type, and sums of |x| / 2 − log σ(|x|) over the points (F, G)."""
    logits_FGP = logits_FGP.float()
    probability_FGP = logits_FGP.sigmoid()
    logs_FGP = ((probability_FGP - 0.5).abs() + 0.5).log()  # σ(|x|) = ½ + |σ(x) − ½|
    return probability_FGP, (logits_FGP.abs() / 2 - logs_FGP).sum(dim=-1)


def visit_on(device: torch.device, logit_type: torch.dtype) -> Visit:
    """The fastest way on a device."""
    return fused_visit(device.type, logit_type) if device.type == "cuda" else visit_logits


@lru_cache
@torch.no_grad()
def fused_visit(device_type: str, logit_type: torch.dtype) -> Visit:
    """`visit_logits`, compiled for logits of a type and any sizes; where compiling fails as it is, and a line says so.

    Gradients have to be off, as in the matching.
    """
    compiled: Any = torch.compile(visit_logits, dynamic=True)
    try:
        # On CUDA of real size: the first call decides how much of a row a kernel takes at once.
        size = (4, 896, 12544) if device_type == "cuda" else (2, 3, 5)
        compiled(torch.zeros(size, dtype=logit_type, device=device_type))
    except Exception as error:  # a missing Triton, C compiler, driver ...: each has errors of its own
        say(f"train: matching is not compiled, so a step takes some ms more on a GPU: {first_line(error)}")
        return visit_logits
    return compiled  # type: ignore[no-any-return]
