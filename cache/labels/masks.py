"""Run-length encoded masks, in the compressed form of the COCO API, handled without decoding them to pixels.

A mask (h, w) is read column by column; its runs alternate background, foreground, background ... and the
first may be 0. Every `Rle` made here is normal: all runs but the first are > 0. That matters: the C code of
pycocotools stops early, and returns a wrong IoU, where two masks both hold an empty inner run.

Encoding and decoding are pycocotools'; only the run lengths, which it does not hand out, are read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

IntArray = NDArray[np.int64]

# pycocotools reserves 6 characters a run, and its decoder shifts 32-bit numbers: with 7 characters (runs of
# 2**29 pixels) it writes past its buffer and reads back another number. Up to 2**25 pixels (more than an 8K
# frame) even the terminating zero of the string fits.
MAX_PIXELS = 2**25
_MAX_CHARACTERS_PER_RUN = 6
_AREAS_AT_ONCE = 255  # pycocotools puts the number of masks into an 8-bit integer, which NumPy 2 refuses beyond


@dataclass(frozen=True, kw_only=True, slots=True)
class Rle:
    """A normal run-length encoded mask (height, width) with COCO's compressed `counts`."""

    height: int
    width: int
    counts: str

    def to_json(self) -> dict[str, object]:
        """The form of YTVIS files, which is also what pycocotools takes."""
        return {"size": [self.height, self.width], "counts": self.counts}


def encode(mask: NDArray[np.uint8] | NDArray[np.bool_]) -> Rle:
    """Encode a mask (h, w); non-zero is foreground."""
    height, width = mask.shape
    coded = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return Rle(height=height, width=width, counts=coded["counts"].decode("ascii"))


def encode_columns(masks_Gwh: NDArray[np.bool_]) -> list[str]:
    """The compressed counts of G masks that lie column by column in memory, (G, w, h): no pixel is copied."""
    columns = np.ascontiguousarray(masks_Gwh).view(np.uint8)
    return [coded["counts"].decode("ascii") for coded in coco_mask.encode(columns.transpose(2, 1, 0))]


def mask(rle: Rle) -> NDArray[np.uint8]:
    """Decode to a mask (h, w) of 0 and 1."""
    pixels: NDArray[np.uint8] = coco_mask.decode(rle.to_json())
    return pixels


def areas(rles: Sequence[Rle]) -> IntArray:
    """Foreground pixels of each mask, (N,)."""
    return coded_areas([rle.to_json() for rle in rles])


def coded_areas(coded: Sequence[dict[str, object]]) -> IntArray:
    """Foreground pixels of each mask in the form of `Rle.to_json`, (N,)."""
    parts = [list(coded[start : start + _AREAS_AT_ONCE]) for start in range(0, len(coded), _AREAS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(coco_mask.area(part), np.int64) for part in parts)])


def from_counts(counts: Sequence[object], height: int, width: int) -> list[Rle]:
    """Normal masks from the `counts` of files: compressed strings and lists of integers may be mixed.

    Raises ValueError, saying what is wrong, unless every mask has non-negative runs that add up to h * w.
    """
    if not counts:
        return []
    texts = [
        item if isinstance(item, str) else _compress(_checked_runs(item, height * width), height, width)
        for item in counts
    ]
    runs, ends = run_lengths(texts)
    starts = np.concatenate(([0], ends[:-1]))
    if runs.size and (runs.min() < 0 or runs.max() > height * width):
        raise ValueError(f"a run length of {runs.min() if runs.min() < 0 else runs.max()}")
    totals = np.diff(np.concatenate(([0], np.cumsum(runs)))[np.concatenate(([0], ends))])
    if wrong := totals[totals != height * width].tolist():
        raise ValueError(f"run lengths that add up to {wrong[0]}, not to {height} x {width} = {height * width}")
    inner_zeros = runs == 0
    inner_zeros[starts] = False
    for index in np.unique(np.searchsorted(ends, np.flatnonzero(inner_zeros), side="right")).tolist():
        texts[index] = _compress(_merge_empty_runs(runs[starts[index] : ends[index]]), height, width)
    return [Rle(height=height, width=width, counts=text) for text in texts]


def side_by_side(frames: Sequence[Rle | None], height: int, width: int) -> Rle:
    """One mask (h, w * T) of T frames laid side by side; None is an empty frame.

    Masks are read column by column, so the runs of the row of frames are the frames' runs one after another
    (pycocotools/common/maskApi.c). Needs h * w * T <= MAX_PIXELS.
    """
    assert height * width * len(frames) <= MAX_PIXELS
    runs, ends = run_lengths([frame.counts for frame in frames if frame is not None])
    present = iter(np.split(runs, ends[:-1]))
    pieces: list[IntArray] = []
    for frame in frames:
        piece = np.array([height * width]) if frame is None else next(present)
        # The next frame starts with background: an odd piece ends with it and needs an empty run between.
        pieces.append(piece if len(piece) % 2 == 0 else np.append(piece, 0))
    joined = _merge_empty_runs(np.concatenate(pieces))
    total_width = width * len(frames)
    return Rle(height=height, width=total_width, counts=_compress(joined, height, total_width))


def run_lengths(texts: Sequence[str]) -> tuple[IntArray, IntArray]:
    """The runs of all `texts` (compressed counts), one after another, and the end of each text among them.

    Six bits a character from "0": five of the number, low bits first, and "more follows"; a number's last
    character carries the sign in its fifth bit. From the fourth run on, a number is the difference to the
    run two before. Raises ValueError for a text that is no such code.
    """
    if not texts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if not all(texts):
        raise ValueError("no run lengths")
    codes = np.frombuffer("".join(texts).encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - ord("0")
    if codes.min() < 0 or codes.max() > 0b111111:
        raise ValueError("a character that compressed run lengths cannot hold")
    text_ends = np.cumsum([len(text) for text in texts])
    is_last = (codes & 0b100000) == 0
    if not is_last[text_ends - 1].all():
        raise ValueError("counts that end in the middle of a number")
    last = np.flatnonzero(is_last)
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > _MAX_CHARACTERS_PER_RUN:
        raise ValueError("a run length that overflows")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    numbers = np.add.reduceat((codes & 0b11111) << shifts, first)
    numbers -= np.where(codes[last] & 0b10000, np.int64(1) << (5 * lengths), 0)
    ends = np.searchsorted(last, text_ends)
    return _undo_differences(numbers, ends), ends


def _undo_differences(numbers: IntArray, ends: IntArray) -> IntArray:
    """Add to every number from its mask's fourth on the run two before it: one running sum per parity."""
    starts = np.concatenate(([0], ends[:-1]))
    rank = np.arange(len(numbers)) - np.repeat(starts, ends - starts)
    runs = numbers.copy()
    for first_rank in (1, 2):
        chain = np.flatnonzero((rank >= first_rank) & ((rank - first_rank) % 2 == 0))
        sums = np.cumsum(numbers[chain])
        heads = np.flatnonzero(rank[chain] == first_rank)
        before = sums[heads] - numbers[chain[heads]]
        runs[chain] = sums - np.repeat(before, np.diff(np.append(heads, len(chain))))
    return runs


def _merge_empty_runs(runs: IntArray) -> IntArray:
    """The same mask with no empty run but, possibly, the first."""
    kept = np.flatnonzero(runs)
    foreground = kept % 2
    heads = np.flatnonzero(np.diff(foreground, prepend=-1))
    merged = np.add.reduceat(runs[kept], heads)
    return np.concatenate(([0], merged)) if foreground[0] == 1 else merged


def _checked_runs(counts: object, pixels: int) -> IntArray:
    """`counts` of a file as integers, or ValueError."""
    if not isinstance(counts, list):
        raise ValueError(f"counts of type {type(counts).__name__} instead of a string or a list of integers")
    if not counts:
        raise ValueError("no run lengths")
    if wrong := [item for item in counts if type(item) is not int or not 0 <= item <= pixels]:
        raise ValueError(f"a run length of {wrong[0]!r}")
    return np.array(counts, dtype=np.int64)


def _compress(runs: IntArray, height: int, width: int) -> str:
    coded = coco_mask.frPyObjects({"size": [height, width], "counts": runs.astype(np.uint32)}, height, width)
    text: str = coded["counts"].decode("ascii")
    return text
