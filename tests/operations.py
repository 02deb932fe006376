"""Counts operations, which a GPU would have to launch one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose"}
VIEWS |= {"unbind", "unsqueeze", "view", "_unsafe_view", "split_with_sizes", "lift_fresh"}


class Operations(TorchDispatchMode):
    """Names of the operations between PyTorch and the device, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts.update([] if name in VIEWS else [name])
        return function(*args, **(kwargs or {}))
