"""Does a cache that is kept in memory (`cache.preload`) fit there?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cache.errors import CacheError
from cache.reader import FeatureCache

_MEMORY = Path("/proc/meminfo")


def require_memory(held: Sequence[tuple[FeatureCache, Sequence[str]]], processes: int) -> None:
    """Raise CacheError where memory is too short for so many processes that each keep these videos of some caches.

    Where the system does not tell what is available, nothing is checked.
    """
    available, needed = available_bytes(), processes * sum(held_bytes(*videos) for videos in held)
    if available is not None and needed > available:
        count = sum(len(names) for _, names in held)
        raise CacheError(
            f"cache.preload keeps {count} videos in the memory of each of {processes} processes",
            where=held[0][0].path,
            expected=f"{needed / 1e9:.2f} GB",
            got=f"{available / 1e9:.2f} GB available",
            hint="set cache.preload=false (cache.stage_to brings the cache to a local disk), or lower train.workers",
        )


def held_bytes(feature_cache: FeatureCache, names: Sequence[str]) -> int:
    """What these videos take in memory, uncompressed."""
    if not names:
        return 0
    first = feature_cache.video(names[0])
    per_frame = math.prod(first.queries.shape[1:]) * first.queries.dtype.itemsize
    per_location = first.maps.shape[1] * first.maps.dtype.itemsize
    videos = [feature_cache.video(name) for name in names]
    return sum(v.attributes.num_frames * (per_frame + math.prod(v.stored_hw) * per_location) for v in videos)


def available_bytes() -> int | None:
    """Memory that can be had without swapping, page cache included; None on systems that do not say."""
    lines = _MEMORY.read_text().splitlines() if _MEMORY.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
