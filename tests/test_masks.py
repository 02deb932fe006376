"""Run-length masks against decoded pixels, and against runs counted by a loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.labels import masks

Mask = NDArray[np.bool_]


@st.composite
def frames_of_a_video(draw: st.DrawFn) -> list[Mask | None]:
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    bits = st.integers(0, 2 ** (height * width) - 1)
    values = draw(st.lists(st.none() | st.just(0) | bits, min_size=1, max_size=5))
    shifts = np.arange(height * width).reshape(height, width)
    return [None if value is None else (value >> shifts.astype(object)) % 2 == 1 for value in values]


def counted_runs(mask: Mask) -> list[int]:
    column_major = [bool(mask[y, x]) for x in range(mask.shape[1]) for y in range(mask.shape[0])]
    groups = [(value, len(list(group))) for value, group in itertools.groupby(column_major)]
    lengths = [length for _, length in groups]
    return [0, *lengths] if groups[0][0] else lengths


def test_hand_worked_mask() -> None:
    # 2 x 3, column by column: (0,0) | (1,0) (0,1) | (1,1) (0,2) (1,2)
    (rle,) = masks.from_counts([[1, 2, 3]], 2, 3)
    assert masks.mask(rle).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert rle.counts == "123"
    assert masks.areas([rle]).tolist() == [2]


@given(frames_of_a_video())
@settings(max_examples=150, deadline=None)
def test_runs_are_those_of_a_loop(frames: list[Mask | None]) -> None:
    present = [frame for frame in frames if frame is not None]
    rles = [masks.encode(frame) for frame in present]
    runs, ends = masks.run_lengths([rle.counts for rle in rles])
    expected = [counted_runs(frame) for frame in present]
    assert runs.tolist() == list(itertools.chain.from_iterable(expected))
    assert ends.tolist() == list(itertools.accumulate(map(len, expected)))
    for rle, frame in zip(rles, present, strict=True):
        np.testing.assert_array_equal(masks.mask(rle), frame)


@given(frames_of_a_video())
@settings(max_examples=150, deadline=None)
def test_side_by_side_is_the_row_of_decoded_frames(frames: list[Mask | None]) -> None:
    height, width = next((frame.shape for frame in frames if frame is not None), (3, 2))
    rles = [None if frame is None else masks.encode(frame) for frame in frames]
    joined = masks.side_by_side(rles, height, width)
    row = np.concatenate([np.zeros((height, width), bool) if f is None else f for f in frames], axis=1)
    np.testing.assert_array_equal(masks.mask(joined), row)
    assert masks.run_lengths([joined.counts])[0].tolist() == counted_runs(row)


@given(frames_of_a_video())
@settings(max_examples=100, deadline=None)
def test_strings_lists_and_empty_runs_are_the_same_mask(frames: list[Mask | None]) -> None:
    present = [frame for frame in frames if frame is not None]
    if not present:
        return
    counts: list[object] = []
    for index, frame in enumerate(present):
        runs = counted_runs(frame)
        split = [part for run in runs for part in ((run - run // 2, 0, run // 2) if index % 2 else (run,))]
        counts.append(masks.encode(frame).counts if index % 3 == 2 else split)
    assert masks.from_counts(counts, *present[0].shape) == [masks.encode(frame) for frame in present]


def test_inner_empty_runs_in_a_compressed_string_are_removed() -> None:
    # [1, 1, 0, 2] in COCO's code: the fourth number is the difference to the second, 2 - 1.
    (rle,) = masks.from_counts(["1101"], 2, 2)
    assert masks.run_lengths([rle.counts])[0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ("", "no run lengths"),
        ([], "no run lengths"),
        ("33", "add up to 6, not to 2 x 2 = 4"),
        ([1, 2], "add up to 3"),
        ([-1, 5], "-1"),
        ([0, 5], "5"),
        ([2.0, 2.0], "2.0"),
        ([True, 3], "True"),
        ([10**30], "1000000"),
        ("1O", "-1"),  # "O" is 31: the sign bit alone.
        ("1~", "a character"),
        ("1\u00e9", "a character"),
        ("1\ud800", "a character"),
        ("1 3", "a character"),
        ("4P", "the middle of a number"),
        ("PPPPPPPP0", "overflows"),
        (None, "NoneType"),
        (7, "int"),
        ({"a": 1}, "dict"),
    ],
)
def test_broken_counts_are_refused(counts: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        masks.from_counts(["4", counts], 2, 2)


def test_uint8_and_bool_masks_encode_alike() -> None:
    mask = np.array([[0, 255, 0], [1, 0, 0]], dtype=np.uint8)
    assert masks.encode(mask) == masks.encode(mask != 0)
    assert masks.encode(mask).counts == "123"


def test_areas_of_more_masks_than_pycocotools_counts() -> None:
    frames = [np.arange(12).reshape(3, 4) < number % 13 for number in range(600)]
    assert masks.areas([masks.encode(frame) for frame in frames]).tolist() == [number % 13 for number in range(600)]
