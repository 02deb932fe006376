"""What a cache holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.fingerprint import Fingerprint
from cache.layout import EXTRACTION_RECORD, FRAME_QUERIES, MASK_FEATURES
from cache.reader import CachedVideo, FeatureCache
from cache.storage.contract import Store


@dataclass(frozen=True, kw_only=True)
class ViewSummary:
    """All videos' views of one kind, such as `flip` or `crop-edge320`; "" are the videos themselves."""

    kind: str
    videos: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts and sizes of a cache; bytes as files on disk, of complete videos only."""

    videos: int
    """Views included."""
    views: list[ViewSummary]
    incomplete: list[str]
    frames: int
    frame_query_bytes: int
    mask_feature_bytes: int
    fingerprint: Fingerprint
    fingerprint_sha256: str
    provenance: list[dict[str, Any]]

    @property
    def bytes_per_frame(self) -> float:
        """Both arrays together; 0 for a cache without frames."""
        return (self.frame_query_bytes + self.mask_feature_bytes) / max(self.frames, 1)


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord:
    """What a cache's extraction has cost so far, over all sessions and processes."""

    seconds: float = 0.0
    frames: int = 0
    bytes: int = 0

    @classmethod
    def read(cls, store: Store) -> ExtractionRecord:
        """What the cache says of it; nothing where it says nothing, or its record is damaged."""
        try:
            return cls(**json.loads(store.read_file(EXTRACTION_RECORD) or b"{}"))
        except (ValueError, TypeError):
            return cls()


def summarise(path: Path | str) -> Summary:
    """Count what is in the cache at `path`. Raises CacheError where there is none."""
    feature_cache = FeatureCache.open(path)
    videos = [feature_cache.video(name) for name in feature_cache.video_names()]
    query_bytes, map_bytes = (
        [video.store.size(video.name, field) for video in videos] for field in (FRAME_QUERIES, MASK_FEATURES)
    )
    return Summary(
        videos=len(videos),
        views=_views(videos, map(sum, zip(query_bytes, map_bytes, strict=True))),
        incomplete=feature_cache.incomplete(),
        frames=sum(video.attributes.num_frames for video in videos),
        frame_query_bytes=sum(query_bytes),
        mask_feature_bytes=sum(map_bytes),
        fingerprint=feature_cache.fingerprint,
        fingerprint_sha256=feature_cache.fingerprint.digest(),
        provenance=list(feature_cache.root.sessions),
    )


def _views(videos: Sequence[CachedVideo], video_bytes: Iterable[int]) -> list[ViewSummary]:
    sizes: dict[str, list[int]] = {}
    for video, size in zip(videos, video_bytes, strict=True):
        sizes.setdefault(video.attributes.view.kind, []).append(size)
    return [ViewSummary(kind=kind, videos=len(held), bytes=sum(held)) for kind, held in sorted(sizes.items())]
