"""`python -m evaluate max-frames --memory 12GiB`: how long a video fits (VITA, Table 4), at once and streaming.

At once means what the release does: the tokens of all frames through encoder and decoder together, every token with
its intermediate values. The peak grows linearly with T, so two short videos tell the longest. On CUDA the allocator's
peak is measured, on CPU that of the process above its level at rest; streaming is measured at a long video.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cache.errors import ConfigError
from evaluate.bench.inference import VideoProblem
from evaluate.bench.memory import in_own_process, repeated
from train_head.bench.measuring import Memory
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.streaming import predict_stream

_SHORT, _LONG = 48, 144  # frames that the line is drawn through; the default windows divide them
_STREAMED = 480
_MMAP_THRESHOLD = -3  # glibc's name for it in `mallopt`
_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the head needs beside its weights: bytes of short and long videos at once, and of a streamed one."""

    short: int
    long: int
    streamed: int

    def longest(self, memory: int) -> int:
        """Frames at once."""
        slope = (self.long - self.short) / (_LONG - _SHORT)
        return int(_SHORT + (memory - self.short) / slope)


def parse_bytes(text: str) -> int:
    """`12GiB`, `800MB`, `1e9` -> bytes. Raises ConfigError."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError("not an amount of memory", where="--memory", expected="such as 12GiB", got=repr(text))
    return int(float(found[1]) * unit)


def max_frames(memory: int, device: str, windows: Sequence[int], shares: Sequence[float]) -> int:
    """Print the table for all windows and all shares of frame queries that pruning keeps; the exit status."""
    print(f"frames in {memory / 2**30:.1f} GiB on {device}, 100 queries x 256 channels, 6 + 3 layers")
    print(f"{'window':>8}{'kept':>6}{'at once':>10}{'MB/frame':>10}{'streaming':>11}{'peak MB':>9}")
    for window in windows:
        for kept in shares:
            fit = in_own_process(_fit, window, kept, device)
            slope = (fit.long - fit.short) / (_LONG - _SHORT) / 1e6
            endless = "any" if fit.streamed < memory else "-"
            row = f"{fit.longest(memory):10}{slope:10.2f}{endless:>11}{fit.streamed / 1e6:9.0f}"
            print(f"{window:8}{kept:6.2f}{row}", flush=True)
    print(f"streaming: peak of {_STREAMED} frames; `python -m evaluate bench-memory` shows that it does not grow")
    return 0


def _return_freed_memory() -> None:
    """Map every tensor by itself (glibc), so that memory is the system's again once it is freed.

    What the heap happens to hold on to is another share of the peak in every process: no two tables agreed.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 16)


@torch.no_grad()
def _fit(window: int, kept: float, device: str) -> Fit:
    torch.set_num_threads(1)
    _return_freed_memory()
    place = torch.device(device)
    problem = VideoProblem(window=window)
    problem = replace(problem, queries=round(kept * problem.queries))
    head = problem.head().to(place)
    queries = replace(problem, frames=problem.block, image_hw=(8, 8)).features()[0]
    peaks = []
    for frames in (_SHORT, _SHORT, _LONG):  # the first warms up
        sized = replace(problem, frames=frames)
        memory = Memory(place)
        head.predict(torch.cat(list(repeated(queries, sized))).to(place))
        peaks.append(memory.peak())
    sized = replace(problem, frames=_STREAMED)
    memory = Memory(place)
    predict_stream(head, (TokenBlock.whole_frames(b.to(place)) for b in repeated(queries, sized)), _STREAMED)
    return Fit(short=peaks[1], long=peaks[2], streamed=memory.peak())
