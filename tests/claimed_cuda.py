"""A CUDA device that is only claimed: what the code for GPUs does with its tensors, where there is no GPU.

Tensors lie on the CPU and are marked as lying on "cuda:0", which they say when asked. An operation on tensors of both
devices raises as on a GPU, and so does whatever would make the host wait where `set_sync_debug_mode` forbids it.
Kernels are those of the CPU: what only they can tell, such as speed and rounding, tests/test_gpu.py asks a real GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from train_head.losses import logit_visits

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_DEVICE, _IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_GRADIENT, _SET_DATA = Tensor.grad.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_NOT_OF_TENSORS = {"device", "_parse_to"}
_CROSSES_DEVICES = {"copy_", "_has_compatible_shallow_copy_type"}
_WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"}


def is_claimed(tensor: Tensor) -> bool:
    """Whether a tensor is marked."""
    return bool(vars(tensor).get("_claimed"))


def _mark(result: Any, claimed: bool = True) -> Any:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            vars(leaf)["_claimed"] = claimed
    return result


class ClaimedCuda(TorchFunctionMode):
    """Marks what is made or computed on the claimed device; of the thread that entered it."""

    waiting = "default"  # as `torch.cuda.set_sync_debug_mode` says

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in _NOT_OF_TENSORS and not any(isinstance(value, Tensor) for value in args):
            return function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        claimed = [is_claimed(tensor) for tensor in tensors]
        if function == _DEVICE and claimed[0]:
            return CUDA
        if function == _IS_CUDA:
            return claimed[0]
        if function == _GRADIENT:
            return _mark(function(*args), claimed[0])
        if function == _SET_DATA:
            function(*args)
            return _mark(args[0], claimed[1])
        if name in ("to", "cpu"):
            return self._move(args if name == "to" else (*args, CPU), kwargs)
        self._require_possible(name, tensors, claimed)
        result = function(*_on_cpu(args), **{key: _on_cpu([value])[0] for key, value in kwargs.items()})
        on_device = any(claimed) or _is_cuda(kwargs.get("device"))
        return _mark(result) if on_device and name != "copy_" else result

    def _move(self, args: Any, kwargs: Any) -> Tensor:
        tensor: Tensor = args[0]
        named = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device | str)]
        other = [value.device for value in args[1:] if isinstance(value, Tensor)]
        goes = torch.device([*named, *other][0]).type == "cuda" if named or other else is_claimed(tensor)
        moved = tensor.to(*_on_cpu(args[1:]), **{key: _on_cpu([value])[0] for key, value in kwargs.items()})
        if goes != is_claimed(tensor):
            if not (kwargs.get("non_blocking") or goes):
                self._wait("to")
            moved = moved.clone() if moved is tensor else moved
        return _mark(moved, goes)  # type: ignore[no-any-return]

    def _require_possible(self, name: str, tensors: list[Tensor], claimed: list[bool]) -> None:
        if name == "numpy" and any(claimed):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        # Numbers of the CPU may take part in an operation of the device.
        lie = {on for tensor, on in zip(tensors, claimed, strict=True) if on or tensor.ndim or name in ("cat", "stack")}
        sends_index = name == "__getitem__" and claimed[0] and len(lie) > 1
        if len(lie) > 1 and name not in _CROSSES_DEVICES and not sends_index:
            places = ", ".join("cuda" if on else "cpu" for on in claimed)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {places}")
        if any(claimed) and (name in _WAITS or sends_index):
            self._wait(name)

    def _wait(self, name: str) -> None:
        if ClaimedCuda.waiting == "error":
            raise RuntimeError(f"{name}: called a synchronizing CUDA operation")


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


def _on_cpu(values: Any) -> tuple[Any, ...]:
    return tuple(CPU if _is_cuda(value) else value for value in values)


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = CUDA

    def record_event(self) -> _Event:
        return _Event()


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self._claims = device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self._claims)


def claim_cuda(patch: pytest.MonkeyPatch) -> ClaimedCuda:
    """What PyTorch says of the machine's devices, for as long as the patches last; the mode has to be entered too."""
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    stand_ins: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _Stream,
        "stream": lambda _: nullcontext(),
        "cudart": lambda: runtime,
        "synchronize": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "set_sync_debug_mode": lambda mode: setattr(ClaimedCuda, "waiting", mode),
    }
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # of some versions
        patch.setattr(torch.optim.Optimizer, check, lambda _: None, raising=False)
    patch.setattr(logit_visits, "fused_visit", lambda *_: logit_visits.visit_logits)  # there is nothing to compile for
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(Tensor, "record_stream", lambda *_: None)
    patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    run = threading.Thread.run

    def run_claimed(thread: threading.Thread) -> None:
        with ClaimedCuda():
            run(thread)

    patch.setattr(threading.Thread, "run", run_claimed)  # a mode is of one thread
    return ClaimedCuda()
