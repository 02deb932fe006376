"""Clips through slots of shared memory, in order, never overwritten while in use; batches on their way to a GPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.errors import ConfigError, CorruptData
from train_head.data.clip_loader import Empty, Slots, load_clips, usual_workers
from train_head.data.upload import Copy, place_batches

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class SmallClip:
    index: int
    read_into_slot: Tensor
    copied: Tensor
    transposed: Tensor
    nothing: Tensor


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Clip i: tensors of i in several types; every third is ten times as large."""

    clip_bytes: int = 4096

    def read(self, index: int, empty: Empty) -> SmallClip:
        size = 900 if index % 3 == 2 else 90
        array = empty((2, size), np.dtype(np.float16))
        array[:] = index
        return SmallClip(
            index=index,
            read_into_slot=torch.from_numpy(array),
            copied=torch.full((3,), index, dtype=torch.bfloat16),
            transposed=torch.arange(index, index + 6).view(2, 3).T,
            nothing=torch.zeros(0, 5, dtype=torch.bool),
        )


def assert_right(clip: SmallClip, index: int) -> None:
    expected = Numbers().read(index, np.empty)
    assert clip.index == index
    for name in ("read_into_slot", "copied", "transposed", "nothing"):
        got, wanted = getattr(clip, name), getattr(expected, name)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_arrive_in_order_whether_they_fit_or_not(workers: int) -> None:
    numbers = [5, 3, 8, *range(20)]
    clips = load_clips(Numbers(), numbers, workers=workers, held=3, device=CPU)
    for clip, number in zip(clips, numbers, strict=True):
        assert_right(clip, number)


def test_memory_is_used_again_but_not_while_anything_refers_to_it() -> None:
    clips = load_clips(Numbers(), range(0, 300, 3), workers=0, held=2, device=CPU)  # 3 slots
    view = next(clips).read_into_slot[1:, ::2].view(torch.int16)
    before = view.clone()
    addresses = {clip.read_into_slot.data_ptr() for clip in clips}
    assert len(addresses) == 2
    assert view.data_ptr() not in addresses
    assert torch.equal(view, before)


def test_clips_all_kept_are_all_right() -> None:
    clips = list(load_clips(Numbers(), range(40), workers=0, held=2, device=CPU))
    for index, clip in enumerate(clips):
        assert_right(clip, index)


def test_slots_too_small_for_any_clip_serve_too() -> None:
    for index, clip in enumerate(load_clips(Numbers(clip_bytes=1), range(5), workers=0, held=1, device=CPU)):
        assert_right(clip, index)


class FakeGpu:
    """What `upload` asks of CUDA, as far as it can be told without a device: how far copies are."""

    def __init__(self) -> None:
        self.sent, self.arrived = 0, 0

    def event(self) -> SimpleNamespace:
        """An event of the copies that are sent by now."""
        self.sent += 1
        number = self.sent

        def synchronize() -> None:
            self.arrived = max(self.arrived, number)

        return SimpleNamespace(record=lambda: None, synchronize=synchronize)


def place(clip: SmallClip, _: Copy) -> SmallClip:
    return SmallClip(**{name: t.clone() if isinstance(t, Tensor) else t for name, t in vars(clip).items()})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return gpu


@pytest.mark.parametrize("workers", [0, 2])
def test_every_clip_of_a_batch_ahead_has_a_slot(workers: int, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also just after a batch, when the memory of the one on its way to the GPU is not yet free."""
    held, without_slot, unpack = 3, [], Slots.unpack

    def watched(slots: Slots, packed: Any) -> Any:
        without_slot.append(packed.slot is None)
        return unpack(slots, packed)

    monkeypatch.setattr(Slots, "unpack", watched)
    clips = load_clips(Numbers(clip_bytes=40_000), range(36), workers=workers, held=held, device=CPU)
    batches = place_batches((list(islice(clips, held)) for _ in range(12)), place, torch.device("cuda"))
    for number, batch in enumerate(batches):
        assert [clip.index for clip in batch] == list(range(held * number, held * (number + 1)))
        assert (gpu.sent, gpu.arrived) == (min(number + 2, 12), number + 1)
        for clip in batch:
            assert_right(clip, clip.index)
        time.sleep(0.02)  # workers read as far ahead as they may
    assert without_slot == [False] * 36


def test_batches_on_the_cpu_are_not_read_ahead() -> None:
    read: list[int] = []

    def batches() -> Iterator[list[SmallClip]]:
        for index in range(3):
            read.append(index)
            yield [Numbers().read(index, np.empty)]

    for number, (clip,) in enumerate(place_batches(batches(), place, CPU)):
        assert_right(clip, number)
        assert read == list(range(number + 1))


def test_memory_that_cannot_be_page_locked_serves_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 801)  # cudaErrorNotSupported
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    slots = Slots(1, 2, 4096)
    slots.pin()
    assert "does not page-lock" in capsys.readouterr().out
    assert_right(slots.unpack(slots.pack(lambda empty: Numbers().read(1, empty))), 1)


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    found = []
    for processes in ("1", "4", "8", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        found.append(usual_workers(torch.device("cuda")))
    assert found == [4, 3, 1, 1] and usual_workers(CPU) == 2


def test_a_killed_trainer_leaves_no_workers(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    words = ["train.workers=1", "train.iterations=100000", "head.enc_layers=2", "head.dec_layers=2", "device=cpu"]
    words += [f"data.root={tiny_data}", f"cache.path={tiny_cache}", f"runs={tmp_path}", "cache.codec=float16"]
    command = [sys.executable, "-m", "train_head", "train", "demo", *words, "loss.num_points=64", "train.log_every=1"]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0)
    log = tmp_path / "demo" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 0)
    trainer.kill()
    assert trainer.stdout is not None
    reading = threading.Thread(target=trainer.stdout.read)  # ends when nobody holds the other end any more
    reading.start()
    reading.join(timeout=30)
    alive = reading.is_alive()
    if alive:
        os.killpg(trainer.pid, signal.SIGKILL)
    assert not alive


def test_an_error_in_a_worker_ends_the_trainer(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_cache / "train", tmp_path / "cache/train")
    for shard in (tmp_path / "cache").glob("train/videos/*/mask_features/c.*"):
        shard.unlink()
    words = [f"data.root={tiny_data}", f"cache.path={tmp_path / 'cache'}", f"runs={tmp_path}", "cache.codec=float16"]
    words += ["train.workers=1", "cache.preload=false", "device=cpu", "loss.num_points=64"]
    command = [sys.executable, "-m", "train_head", "train", "demo", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert re.search(r"^error: .*shard cannot be opened.*\n  hint: .*\n\Z", ended.stderr, re.MULTILINE), ended.stderr


@dataclass(frozen=True, kw_only=True)
class Failing(Numbers):
    """What a worker may meet when it reads clip 3."""

    error: BaseException | None
    """None: the kernel's out-of-memory killer."""

    def read(self, index: int, empty: Empty) -> SmallClip:
        if index == 3 and self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and self.error is not None:
            raise self.error
        return super().read(index, empty)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_clip_arrives_as_it_was_raised(workers: int) -> None:
    error = CorruptData("bytes fail their checksum", where="videos/7", hint="extract it again")
    clips = load_clips(Failing(error=error), range(5), workers=workers, held=1, device=CPU)
    assert [next(clips).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CorruptData) as caught:
        next(clips)
    assert str(caught.value) == str(error) and caught.value.hint == error.hint


@pytest.mark.parametrize("error", [None, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_workers_short_of_memory_are_no_bug(error: BaseException | None) -> None:
    with pytest.raises(ConfigError, match=r"train\.workers=1: .*memory(.|\n)*hint: train\.workers=0"):
        list(load_clips(Failing(error=error), range(5), workers=1, held=1, device=CPU))


def test_another_failure_of_a_worker_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        list(load_clips(Failing(error=RuntimeError("no such thing")), range(5), workers=1, held=1, device=CPU))


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)
