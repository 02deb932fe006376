"""Training on several processes (torchrun): who am I, and sums over all.

The losses are divided by sums over the whole batch, wherever its clips are; so the gradients of all processes are
simply added, and any number of processes trains as one does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

# The others wait while one machine copies a cache to its disk, or the main process evaluates; NCCL gives up after 10
# minutes. A process that died does not take so long: torchrun ends the others.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class Group:
    """This process's number among all that train together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        distributed.all_reduce(flat)
        for parameter, summed in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def agrees(self, number: int, device: torch.device) -> bool:
        """Whether all processes have the same number; all get the same answer."""
        others = self.sum(torch.tensor(number, device=device)) - number * self.size
        return int(self.sum(others.abs())) == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Wait for all, then part: the end of a program, which must not pull others' connections down."""
        self.wait()
        if self.size > 1:
            distributed.destroy_process_group()


def join_group(device: str) -> tuple[Group, torch.device]:
    """Join the processes that torchrun started, one GPU each (nccl), or on CPU (gloo); alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group(), torch.device(device)
    local = int(os.environ["LOCAL_RANK"])
    own = torch.device(device, local) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", timeout=_PATIENCE, device_id=own if device == "cuda" else None
    )
    return Group(rank=distributed.get_rank(), size=distributed.get_world_size()), own


def share_of_batches(steps: range, batch_clips: int, group: Group) -> Iterator[int]:
    """This process's clip numbers: its part of the batch of each step."""
    own = batch_clips // group.size
    for step in steps:
        first = step * batch_clips + group.rank * own
        yield from range(first, first + own)
