"""What the C library does with memory that tensors free, in training on a CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for what `mallopt` sets
_LARGEST_KEPT = 32 << 20  # bytes; glibc takes no more


def keep_freed_memory() -> None:
    """Keep freed memory for the next step: each page that comes anew from the system has to be faulted in.

    By default glibc returns what is free at the end of its heap, and a step asks for it again: 20,000 to 70,000 pages,
    5 % of a step at real size. The process stays as large as at its peak. Does nothing without glibc.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
