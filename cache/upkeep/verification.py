"""Whether a cache is sound: every rule of FORMAT.md that can be checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.codecs import codec_class, codec_identity
from cache.errors import CorruptData, VitaCacheError, shown, some
from cache.labels.annotations import parse_labels
from cache.layout import ANNOTATIONS, AXES, CHECKSUMS, FRAME_QUERIES, MASK_FEATURES, shard_ranges
from cache.reader import CachedVideo, FeatureCache
from cache.storage.shard_layout import content_checksum
from cache.writer import video_sources


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One defect: where it is, which rule of FORMAT.md it breaks, and what was found."""

    where: str
    rule: str
    message: str
    warning: bool = False
    """Whether it is worth knowing, but no defect."""


def verify_root(feature_cache: FeatureCache) -> Iterator[Finding]:
    """Check all but the videos: root, heads, codec, records, labels, unfinished videos, how videos and labels agree."""
    where = shown(feature_cache.path)
    checks = (
        ("fingerprint", lambda: _check_digest(feature_cache)),
        ("detector", lambda: feature_cache.heads),
        ("codec", lambda: _check_codec(feature_cache)),
        ("skipped", feature_cache.skipped),
    )
    for rule, check in checks:
        try:
            check()
        except VitaCacheError as error:
            yield Finding(where=where, rule=rule, message=str(error))
    complete = {name: bool(attributes) for name, attributes in feature_cache.store.videos()}
    for name in (name for name, is_complete in complete.items() if not is_complete):
        yield Finding(where=f"{where}: video {name!r}", rule="complete", message="extraction did not finish")
    yield from _verify_labels(feature_cache, complete)


def _check_digest(feature_cache: FeatureCache) -> None:
    root, digest = feature_cache.store.attributes("") or {}, feature_cache.fingerprint.digest()
    stored = root.get("fingerprint_sha256")
    if stored != digest:
        raise CorruptData("the fingerprint is not that of fingerprint_sha256", expected=stored, got=digest)


def _check_codec(feature_cache: FeatureCache) -> None:
    """Raise CorruptData unless the codec is the one that the fingerprint names, and fits the heads."""
    codec, wanted = feature_cache.codec, feature_cache.fingerprint.codec
    if codec_identity(codec) != wanted:
        raise CorruptData("codec and fingerprint disagree", expected=wanted, got=codec_identity(codec))
    try:
        num_channels = feature_cache.heads.feature_dim
    except VitaCacheError:
        return  # Reported already.
    try:
        codec.fold(np.zeros((1, num_channels), np.float32))
    except ValueError as error:
        raise CorruptData(f"the codec is not for {num_channels} channels, which the heads have") from error


def _verify_labels(feature_cache: FeatureCache, complete: Mapping[str, bool]) -> Iterator[Finding]:
    """`complete`: every video that was begun, and whether it is complete."""
    labels = shown(feature_cache.path / ANNOTATIONS)
    try:
        content = feature_cache.store.read_file(ANNOTATIONS)
        if content is None:
            return
        sources, document = video_sources(content), json.loads(content)
        if document.get("categories"):  # Videos without any object may come without categories.
            parse_labels(document, labels)
    except VitaCacheError as error:
        yield Finding(where=labels, rule="labels", message=str(error))
        return
    listed = {str(video["id"]): video for video in document["videos"]}
    for name in (name for name, is_complete in complete.items() if is_complete):
        message = _misalignment(feature_cache, name, sources, listed)
        if message is not None:
            yield Finding(where=f"{labels}: video {name!r}", rule="labels", message=f"the video {message}")
    if absent := sorted(listed.keys() - {name.partition("@")[0] for name in complete}):
        message = f"{len(absent)} of {len(listed)} labelled videos are not in the cache: {some(absent)}"
        yield Finding(where=labels, rule="absent", message=message, warning=True)


def _misalignment(
    feature_cache: FeatureCache, name: str, sources: Mapping[str, str], listed: Mapping[str, Any]
) -> str | None:
    """How a video contradicts the labels' digests, sizes and numbers of frames, None where it agrees."""
    video_id = name.partition("@")[0]
    if video_id not in sources:
        return "is not in the labels"
    try:
        video = feature_cache.video(name)
    except VitaCacheError:
        return None  # Reported where the video is verified.
    if video.source not in (None, sources[video_id]):
        return "shows other frames than the labels list"
    stored, wanted = video.attributes, listed[video_id]
    if stored.num_frames != len(wanted["file_names"]):
        return f"has {stored.num_frames} frames, the labels list {len(wanted['file_names'])}"
    size = stored.view.crop[2:] if stored.view.crop else (wanted["height"], wanted["width"])
    return None if stored.original_hw == size else f"has frames of {stored.original_hw}, by labels and view {size}"


def verify_video(feature_cache: FeatureCache, name: str) -> Iterator[Finding]:
    """Read a complete video as a whole: checksums, shapes, dtypes, finite numbers; one finding a field."""
    where = f"{shown(feature_cache.path)}: video {name!r}"
    try:
        video = feature_cache.video(name)
    except VitaCacheError as error:
        yield Finding(where=where, rule="attributes", message=str(error))
        return
    if video.attributes.view.name != name.partition("@")[2]:
        message = f"the group's name does not follow from its view, {video.attributes.view.name!r}"
        yield Finding(where=where, rule="attributes", message=message)
    for field in (FRAME_QUERIES, MASK_FEATURES):
        try:
            defect = _defect(feature_cache, video, field)
        except VitaCacheError as error:
            defect = str(error)
        if defect:
            yield Finding(where=where, rule=field, message=defect)


def _defect(feature_cache: FeatureCache, video: CachedVideo, field: str) -> str | None:
    array = video.queries if field == FRAME_QUERIES else video.maps
    dtype = np.dtype("<f2") if field == FRAME_QUERIES else codec_class(feature_cache.root.codec_name).dtype
    if array.dtype != dtype:
        return f"dtype {array.dtype} instead of {dtype}"
    for axis, size in _expected_sizes(feature_cache, field).items():
        stored = array.shape[AXES[field].index(axis)]
        if stored != size:
            return f"{stored} instead of {size} on the axis {axis}, by fingerprint, heads and codec"
    checksum = 0
    for frames in shard_ranges(video.attributes.num_frames):
        block = array.read(frames)
        finite = np.isfinite(block).all(axis=(1, 2, 3))
        if not finite.all():
            return f"frame {frames[int(np.argmin(finite))]} is not finite"
        checksum = content_checksum(block, checksum)
    noted = video.checksums
    if noted is None or (isinstance(noted, Mapping) and noted.get(field) == checksum):
        return None
    return f"sound frames, but others than were extracted: the attribute {CHECKSUMS} does not fit them"


def _expected_sizes(feature_cache: FeatureCache, field: str) -> dict[str, int]:
    """Axis -> size, where the cache itself says it."""
    sizes = {"L": feature_cache.fingerprint.num_layers} if field == FRAME_QUERIES else {}
    try:
        codec, heads = feature_cache.codec, feature_cache.heads
    except VitaCacheError:
        return sizes  # Reported by verify_root.
    if field == FRAME_QUERIES:
        return {**sizes, "C": heads.hidden_dim}
    return {"R": codec.stored_channels(heads.feature_dim)}
