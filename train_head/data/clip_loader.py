"""Clips on their way to the trainer: read ahead by worker processes into memory that is shared and used again.

Through PyTorch's own loader every tensor of every clip becomes new shared memory: for a clip of 45 MB that is 36 ms
of page faults in the worker and 9 ms in the trainer, where reading takes 3 ms, and a handshake of sockets for each
tensor (LOG.md). Here memory is allocated once, in slots of one clip. Workers read straight into a slot and send where
in it every tensor lies. On CUDA the slots are page-locked, so that a step need not wait for copies (upload.py).
"""

from __future__ import annotations

import ctypes
import io
import math
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cache.allocation import keep_freed_memory
from cache.errors import ConfigError, VitaCacheError, is_out_of_memory
from cache.progress import say
from train_head.stopping import ignore_interrupts

Empty = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Allocates an array of a shape and dtype, to be filled."""
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_ALIGNMENT = 4096
_AHEAD = 2  # clips that every worker has ready at least


class ClipReader(Protocol[T_co]):
    """Reads clip number i of an endless stream, in any process."""

    @property
    def clip_bytes(self) -> int:
        """What the tensors of most clips fit into; others take a slower way to the trainer."""
        ...

    def read(self, index: int, empty: Empty) -> T_co:
        """Read clip `index`; arrays of `empty` need no copy on the way."""
        ...


def load_clips(
    clips: ClipReader[T], indices: Iterable[int], *, workers: int | None, held: int, device: torch.device
) -> Iterator[T]:
    """Yield the clips of these numbers in order; `held` of them may be in use without slowing the workers down.

    With 0 workers the clips are read when they are asked for; None takes `usual_workers`. A clip's memory is used
    again once nothing refers to its tensors any more: whoever copies them to a device without waiting has to keep
    them until they have arrived. Raises what reading a clip raises, ConfigError where workers have too little memory.
    """
    workers = num_workers(workers, device)
    ahead = max(_AHEAD, -(-held // workers) + 1) if workers else 1
    slots = Slots(max(1, workers), ahead + -(-held // max(1, workers)), clips.clip_bytes)
    if device.type == "cuda":
        slots.pin()
    loader: DataLoader[_PackedClip] = DataLoader(
        _PackedClips(clips, slots),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_start_worker,
    )
    packed_clips = iter(loader)
    try:
        for packed in packed_clips:
            if packed.error is not None:
                raise packed.error
            yield slots.unpack(packed)
    except (RuntimeError, MemoryError) as error:
        if not workers or not (is_out_of_memory(error) or _is_any_killed(packed_clips)):
            raise
        raise ConfigError(
            "a data worker was killed, or could not go on: the machine's memory does not suffice",
            where=f"train.workers={workers}",
            hint=f"train.workers={workers // 2}, or cache.preload=false; the last checkpoint is untouched",
        ) from error
    finally:
        if workers:  # now, not when an exception that holds the iterator is let go: the process would wait for them
            packed_clips._shutdown_workers()  # type: ignore[attr-defined]


def _is_any_killed(packed_clips: object) -> bool:
    """Whether a worker got SIGKILL, which none has from us: Linux sends it where memory runs out."""
    return any(worker.exitcode == -signal.SIGKILL for worker in packed_clips._workers)  # type: ignore[attr-defined]


def num_workers(chosen: int | None, device: torch.device) -> int:
    """Resolve `train.workers`."""
    return usual_workers(device) if chosen is None else chosen


def usual_workers(device: torch.device) -> int:
    """How many processes read ahead where nobody says: on CUDA up to four, of the cores that are this process's share.

    A clip of 6 frames takes one core 12 ms, from memory. If a step of 8 clips takes a GPU 40 ms, which nobody has
    measured yet, three keep up, and four also where files come from the disk or are unpacked.
    """
    if device.type != "cuda":
        return 2
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(1, cores - 1))


def _start_worker(number: int) -> None:
    ignore_interrupts(number)
    keep_freed_memory()
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this worker with the trainer, however that ends: PyTorch watches the fork server, which stays."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


@dataclass(frozen=True, kw_only=True)
class _PackedClip:
    """A clip without its tensors, which lie in a slot, or why it cannot be read: all that goes through the pipe."""

    slot: int | None = None
    content: bytes = b""
    error: VitaCacheError | OSError | None = None


class _PackedClips(Dataset[_PackedClip], Generic[T]):
    def __init__(self, clips: ClipReader[T], slots: Slots) -> None:
        self.clips, self.slots = clips, slots

    def __getitem__(self, index: int) -> _PackedClip:
        try:
            return self.slots.pack(lambda empty: self.clips.read(index, empty))
        except (VitaCacheError, OSError) as error:  # PyTorch would raise another, whose message is a traceback
            return _PackedClip(error=error)


class Slots:
    """Shared memory in pieces of one clip, some for each worker process; pickled while a process is started."""

    def __init__(self, workers: int, per_worker: int, slot_bytes: int) -> None:
        self.per_worker, self.slot_bytes = per_worker, -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = RawArray(ctypes.c_uint8, workers * per_worker * self.slot_bytes)
        self._taken = RawArray(ctypes.c_uint8, workers * per_worker)

    def pin(self) -> None:
        """Page-lock the memory for the CUDA device; where the system refuses, copies are slower, and a line says so."""
        address, size = ctypes.addressof(self._memory), len(self._memory)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(address, size, 0)) == 0:
            weakref.finalize(self, runtime.cudaHostUnregister, address)
            return
        with suppress(RuntimeError):  # CUDA reports a failed call a second time, to whoever launches the next kernel
            torch.ones(1, device="cuda")
        say(
            f"train: the system does not page-lock {size / 1e9:.1f} GB for clips, so copies to the GPU are slower: "
            "raise the limit of locked memory (`ulimit -l unlimited`; in Docker --ulimit memlock=-1), or lower "
            "train.workers"
        )

    def pack(self, read: Callable[[Empty], object]) -> _PackedClip:
        """Read a clip into a free slot of this process; without a free one, or room in it, the pipe takes more."""
        number = self._take()
        room = _Room(np.empty(0, np.uint8) if number is None else self._slot(number))
        content = io.BytesIO()
        _Packer(content, room).dump(read(room.empty))
        return _PackedClip(slot=number, content=content.getvalue())

    def unpack(self, packed: _PackedClip) -> Any:
        """The clip, its tensors in the slot, which is free again when the last of them has gone."""
        # An object of its own, which the tensors keep alive.
        memory = np.empty(0, np.uint8) if packed.slot is None else self._slot(packed.slot)
        if packed.slot is not None:
            weakref.finalize(memory, self._release, packed.slot).atexit = False
        return _Unpacker(io.BytesIO(packed.content), memory).load()

    def _take(self) -> int | None:
        """The first free slot of this process, from now on taken."""
        worker = get_worker_info()
        first = 0 if worker is None else worker.id * self.per_worker
        for number in range(first, first + self.per_worker):
            if not self._taken[number]:
                self._taken[number] = 1
                return number
        return None

    def _release(self, number: int) -> None:
        self._taken[number] = 0

    def _slot(self, number: int) -> NDArray[np.uint8]:
        start = number * self.slot_bytes
        return np.frombuffer(self._memory, np.uint8, self.slot_bytes, start)


class _Room:
    """A slot that is being filled."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory, self._used = memory, 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in the slot, or elsewhere where it is full."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        start = self.reserve(size)
        if start is None:
            return np.empty(shape, dtype)
        return self.memory[start : start + size].view(dtype).reshape(shape)

    def reserve(self, size: int) -> int | None:
        """Where `size` bytes begin that nothing else uses."""
        start = -(-self._used // 64) * 64
        if start + size > len(self.memory):
            return None
        self._used = start + size
        return start

    def place(self, tensor: Tensor) -> int | None:
        """Where in the slot a tensor lies, or its copy; None where there is no room."""
        size = tensor.numel() * tensor.element_size()
        start = tensor.data_ptr() - self.memory.ctypes.data
        if 0 <= start <= len(self.memory) - size and tensor.is_contiguous():
            return start
        reserved = self.reserve(size)
        if reserved is not None:
            _tensor_at(self.memory, reserved, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
        return reserved


def _tensor_at(memory: NDArray[np.uint8], start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the memory, which it keeps alive."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


class _Packer(pickle.Pickler):
    """Pickles all but tensors, which it puts into the slot."""

    def __init__(self, file: io.BytesIO, room: _Room) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._room = room

    def persistent_id(self, value: object) -> Any:
        if not isinstance(value, Tensor) or not value.numel():
            return None
        start = self._room.place(value)
        return None if start is None else (start, value.dtype, tuple(value.shape))


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: NDArray[np.uint8]) -> None:
        super().__init__(file)
        self._memory = memory

    def persistent_load(self, place: Any) -> Tensor:
        return _tensor_at(self._memory, *place)
