"""Clips through slots of shared memory: the right numbers in order, never overwritten while they are in use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from train_head.data.clip_loader import Empty, load_clips

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
