"""Small numbers on their way between host and device, in one copy each way and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of one number type as tensors on the device, sent together."""
    joined = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        # From memory that is not page-locked, a copy would wait for all that runs on the device.
        joined = (joined.pin_memory() if len(joined) else joined).to(device, non_blocking=True)
    parts = torch.split(joined, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class HostCopy:
    """A tensor's copy to the host: what is queued on the device after it need not be waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied = tensor.to("cpu", non_blocking=True)
        self._done = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> NDArray[Any]:
        """The numbers, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._copied.numpy()
