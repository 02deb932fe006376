"""What a cache holds, and whether it is sound."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.codecs import Codec, codec_identity
from cache.errors import CorruptData, VitaCacheError
from cache.fingerprint import Fingerprint
from cache.labels.annotations import parse_labels
from cache.layout import ANNOTATIONS, FRAME_QUERIES, MASK_FEATURES, shard_ranges
from cache.reader import CachedVideo, FeatureCache
from cache.writer import video_sources


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
class Finding:
    """One defect: where it is, which rule of FORMAT.md it breaks, and what was found."""

    where: str
    rule: str
    message: str


def summarise(path: Path | str) -> Summary:
    """Count what is in the cache at `path`. Raises CacheError where there is none."""
    feature_cache = FeatureCache.open(path)
    videos = [feature_cache.video(name) for name in feature_cache.video_names()]
    return Summary(
        videos=len(videos),
        views=_views(videos),
        incomplete=feature_cache.incomplete(),
        frames=sum(video.attributes.num_frames for video in videos),
        frame_query_bytes=sum(video.store.size(video.name, FRAME_QUERIES) for video in videos),
        mask_feature_bytes=sum(video.store.size(video.name, MASK_FEATURES) for video in videos),
        fingerprint=feature_cache.fingerprint,
        fingerprint_sha256=feature_cache.fingerprint.digest(),
        provenance=list(feature_cache.root.sessions),
    )


def _views(videos: Sequence[CachedVideo]) -> list[ViewSummary]:
    sizes: dict[str, list[int]] = {}
    for video in videos:
        size = video.store.size(video.name, FRAME_QUERIES) + video.store.size(video.name, MASK_FEATURES)
        sizes.setdefault(video.attributes.view.kind, []).append(size)
    return [ViewSummary(kind=kind, videos=len(held), bytes=sum(held)) for kind, held in sorted(sizes.items())]


def verify_root(feature_cache: FeatureCache) -> Iterator[Finding]:
    """Check all but the videos: heads, codec, labels, unfinished videos, and videos unknown to the labels."""
    where = str(feature_cache.path)
    for rule, load in (("codec", lambda: _own_codec(feature_cache)), ("detector", lambda: feature_cache.heads)):
        try:
            load()
        except VitaCacheError as error:
            yield Finding(where=where, rule=rule, message=str(error))
    for name in feature_cache.incomplete():
        yield Finding(where=f"{where}: video {name!r}", rule="complete", message="extraction did not finish")
    yield from _verify_labels(feature_cache)


def _own_codec(feature_cache: FeatureCache) -> Codec:
    """The codec, if it is the one that the fingerprint names."""
    codec, wanted = feature_cache.codec, feature_cache.fingerprint.codec
    if codec_identity(codec) != wanted:
        raise CorruptData("codec and fingerprint disagree", expected=wanted, got=codec_identity(codec))
    return codec


def _verify_labels(feature_cache: FeatureCache) -> Iterator[Finding]:
    labels, content = feature_cache.path / ANNOTATIONS, feature_cache.store.read_file(ANNOTATIONS)
    if content is None:
        return
    try:
        sources, document = video_sources(content), json.loads(content)
        if document.get("categories"):  # Videos without any object may come without categories.
            parse_labels(document, str(labels))
    except VitaCacheError as error:
        yield Finding(where=str(labels), rule="labels", message=str(error))
        return
    lengths = {str(video["id"]): len(video["file_names"]) for video in document["videos"]}
    for name in feature_cache.video_names():
        message = _misalignment(feature_cache, name, sources, lengths)
        if message is not None:
            yield Finding(where=f"{labels}: video {name!r}", rule="labels", message=f"the video {message}")


def _misalignment(
    feature_cache: FeatureCache, name: str, sources: Mapping[str, str], lengths: Mapping[str, int]
) -> str | None:
    """How a video contradicts the labels' digests of frames and numbers of frames, None where it agrees."""
    video_id = name.partition("@")[0]
    if video_id not in sources:
        return "is not in the labels"
    try:
        video = feature_cache.video(name)
    except VitaCacheError:
        return None  # Reported where the video is verified.
    if video.source not in (None, sources[video_id]):
        return "shows other frames than the labels list"
    stored, listed = video.attributes.num_frames, lengths[video_id]
    return None if stored == listed else f"has {stored} frames, the labels list {listed}"


def verify_video(feature_cache: FeatureCache, name: str) -> Iterator[Finding]:
    """Read a complete video as a whole: checksums, shapes, dtypes, finite numbers; one finding a field."""
    where = f"{feature_cache.path}: video {name!r}"
    try:
        video = feature_cache.video(name)
    except VitaCacheError as error:
        yield Finding(where=where, rule="attributes", message=str(error))
        return
    for field in (FRAME_QUERIES, MASK_FEATURES):
        try:
            message = _defect(feature_cache, video, field)
        except VitaCacheError as error:
            message = str(error)
        if message:
            yield Finding(where=where, rule=field, message=message)


def _defect(feature_cache: FeatureCache, video: CachedVideo, field: str) -> str | None:
    dtype = np.dtype("<f2") if field == FRAME_QUERIES else feature_cache.codec.dtype
    for frames in shard_ranges(video.attributes.num_frames):
        block = video.frame_queries(frames) if field == FRAME_QUERIES else video.mask_features(frames)
        if block.dtype != dtype:
            return f"dtype {block.dtype} instead of {dtype}"
        if field == FRAME_QUERIES and block.shape[1] != feature_cache.fingerprint.num_layers:
            return f"{block.shape[1]} detector layers instead of {feature_cache.fingerprint.num_layers}"
        finite = np.isfinite(block).all(axis=(1, 2, 3))
        if not finite.all():
            return f"frame {frames[int(np.argmin(finite))]} is not finite"
    return None
