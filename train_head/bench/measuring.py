"""What the benchmarks of a step measure with: seconds, peak memory, and how fast large products are."""

from __future__ import annotations

import ctypes
import math
import time
from pathlib import Path

import torch

from train_head.products import product


class Stopwatch:
    """Seconds: of this process's processor time on CPU, which others on the machine hardly touch; real on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter() if self.device.type == "cuda" else time.process_time()
        seconds, self.started = now - self.started, now
        return seconds


class Memory:
    """Peak above what is held between two steps: of the device's allocator, or of the process (Linux, VmHWM)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.idle = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.idle = _status("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        held = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status("VmHWM")
        return held - self.idle


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def product_rate(device: torch.device) -> float:
    """Operations a second of the head's largest kind of product, in the step's precision; the best of many."""
    number_type, rows = (torch.bfloat16, 1 << 14) if device.type == "cuda" else (torch.float32, 1500)
    tokens, weight = torch.randn(rows, 256, device=device), torch.randn(2048, 256, device=device)
    tokens, weight = tokens.to(number_type), weight.to(number_type)
    watch, best, at_once = Stopwatch(device), math.inf, 50 if device.type == "cuda" else 1  # hides the launches
    for _ in range(30):
        watch.lap()
        for _ in range(at_once):
            product(tokens, weight)
        best = min(best, watch.lap() / at_once)
    return 2 * rows * 256 * 2048 / best
