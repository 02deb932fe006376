"""What the C library does with memory that tensors free, in work on a CPU that does the same over and over."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's names for what `mallopt` sets
_LARGEST_KEPT = 32 << 20  # bytes; glibc takes no more as a threshold


def keep_freed_memory(*, however_large: bool = False) -> None:
    """Keep freed memory for the next step or frame: each page that comes anew from the system has to be faulted in.

    By default glibc returns what is free at the end of its heap, and the next step asks for it again: 5 % of a training
    step at real size, up to a quarter of the demo's detector. What is beyond 32 MB it always returns, unless
    `however_large`: up to a third of R50's time; training has few such tensors. The process stays as large as at its
    peak.
    Does nothing without glibc.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        if however_large:
            library.mallopt(_MMAP_MAX, 0)
        else:
            library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
