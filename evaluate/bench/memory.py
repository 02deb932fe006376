"""`python -m evaluate bench-memory`: peak memory of inference against the length of the video.

Every video is a process of its own; its features are made block by block, as a cache would be read. Everything counts:
the frames' tokens, the masks, their run lengths.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TypeVar

import torch
from torch import Tensor

from evaluate.bench.inference import SMALL, VideoProblem
from evaluate.tracks.inference import predict_video
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.mask_folding import MapDecoding

Found = TypeVar("Found")
REAL = VideoProblem(enc_layers=2, dec_layers=2, top_k=3)  # few layers and tracks save hours, and hold as many frames
LENGTHS = ((SMALL, (1_000, 10_000, 100_000)), (REAL, (500, 5_000)))


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Of one process: bytes that were resident at most, bytes of its torch allocations on CUDA (0 on CPU)."""

    resident: int
    device: int


def bench_memory(device: str) -> int:
    """Print the table; status 1 where a peak lies more than 10 % above that of the shortest video."""
    grows = False
    for problem, lengths in LENGTHS:
        height, width = problem.image_hw
        print(f"\n{problem.queries} queries x {problem.channels} channels, {height} x {width} pixels, ", end="")
        print(f"{problem.enc_layers} + {problem.dec_layers} layers, {problem.top_k} tracks")
        print(f"{'frames':>9}{'peak MB':>10}{'of first':>10}{'CUDA MB':>10}")
        first = 0
        for length in lengths:
            peak = in_own_process(_peak, replace(problem, frames=length), device)
            first = first or peak.resident
            grows |= peak.resident > 1.1 * first
            ratio = peak.resident / first
            print(f"{length:9}{peak.resident / 1e6:10.0f}{ratio:10.3f}{peak.device / 1e6:10.0f}", flush=True)
    return int(grows)


def in_own_process(work: Callable[..., Found], *words: object) -> Found:
    """What `work` returns in a fresh process; BrokenProcessPool where that is killed, as for too much memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *words).result()


def _peak(problem: VideoProblem, device: str) -> Peak:
    """Predict a video of `problem.frames` frames; what this process took."""
    torch.set_num_threads(1)
    _predict_generated(problem, torch.device(device))
    allocated = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Peak(resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=allocated)


def _predict_generated(problem: VideoProblem, device: torch.device) -> None:
    """Whole-video inference, streaming, on generated features."""
    queries, maps = replace(problem, frames=problem.block).features()
    predict_video(
        problem.head().to(device),
        (TokenBlock.whole_frames(block.to(device)) for block in repeated(queries, problem)),
        (block.to(device) for block in repeated(maps, problem)),
        num_frames=problem.frames,
        decoding=MapDecoding(),
        image_hw=problem.image_hw,
        original_hw=problem.image_hw,
        top_k=problem.top_k,
    )


def repeated(frames: Tensor, problem: VideoProblem) -> Iterator[Tensor]:
    """Copies of the same frames, until there are `problem.frames`."""
    for start in range(0, problem.frames, len(frames)):
        yield frames[: problem.frames - start].clone()
