"""Keeping caches in order: what may go (`prune`), what sets two apart (`diff`), older formats (`upgrade`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import CacheError, some
from cache.layout import ANNOTATIONS, FORMAT_VERSION, VIDEOS
from cache.reader import FeatureCache, Root
from cache.storage.locks import VideoLocks
from cache.storage.stores import FolderStore, committed, open_store
from cache.writer import video_sources

ORPHANED, UNFINISHED = f"not in {ANNOTATIONS}", "extraction did not finish"


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """A video's folder that no reader and no label asks for."""

    folder: Path
    reason: str
    bytes: int


def prunable(feature_cache: FeatureCache) -> list[Prunable]:
    """Videos whose extraction did not finish, and those that the labels no longer name (views included).

    Without labels in the cache nothing is orphaned. Raises CacheError for a cache that is not in a folder.
    """
    if not isinstance(feature_cache.store, FolderStore):
        raise CacheError("only a cache in a folder can be pruned", where=feature_cache.path)
    labels = feature_cache.store.read_file(ANNOTATIONS)
    known = None if labels is None else video_sources(labels)
    found = []
    for name, complete in feature_cache.store.videos():
        orphaned = known is not None and name.partition("@")[0] not in known
        if complete and not orphaned:
            continue
        folder = feature_cache.path / VIDEOS / name
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found.append(Prunable(folder=folder, reason=ORPHANED if orphaned else UNFINISHED, bytes=size))
    return found


def prune(found: list[Prunable]) -> None:
    """Delete the folders, each under its lock, but for videos that have been finished meanwhile.

    Raises VideoBusy where another process writes one of them.
    """
    for entry in found:
        path, name = entry.folder.parent.parent, entry.folder.name
        with VideoLocks(path).held(name):
            if entry.reason == ORPHANED or not committed(FolderStore(path=path), name):
                shutil.rmtree(entry.folder)


def upgrade(path: Path | str) -> str:
    """Convert a cache of an older format to the newest, in place; returns what was done.

    Format 1 is the only one so far. A later format adds its step here: it rewrites what differs and the root last.
    Raises FormatVersionError for a format that this release does not know.
    """
    Root.read(open_store(path))
    return f"{path}: is format {FORMAT_VERSION} already: nothing to do"


def differences(first: FeatureCache, second: FeatureCache) -> Iterator[str]:
    """What sets two caches apart, in sentences: features, videos, labels, and how they came about."""
    yield from (f"features: {line}" for line in first.fingerprint.differences(second.fingerprint))
    if first.root.codec_parameters != second.root.codec_parameters:
        yield f"codec parameters: {first.root.codec_parameters} here, {second.root.codec_parameters} there"
    names = set(first.video_names()), set(second.video_names())
    for here, only in (("here", names[0] - names[1]), ("there", names[1] - names[0])):
        if only:
            yield f"videos: {len(only)} only {here}: {some(sorted(only))}"
    other_frames = [name for name in sorted(names[0] & names[1]) if _shown(first, name) != _shown(second, name)]
    if other_frames:
        yield f"videos: {len(other_frames)} show other frames, such as {some(other_frames)}"
    if first.store.read_file(ANNOTATIONS) != second.store.read_file(ANNOTATIONS):
        yield "labels: the label files differ"
    yield from _origins(first.root.sessions, second.root.sessions)


def _shown(feature_cache: FeatureCache, name: str) -> tuple[object, ...]:
    video = feature_cache.video(name)
    return video.source, video.attributes


def _origins(first: tuple[dict[str, Any], ...], second: tuple[dict[str, Any], ...]) -> Iterator[str]:
    """Differences of the last writing sessions; they never decide whether features are interchangeable."""
    here, there = (_flat(sessions[-1]) if sessions else {} for sessions in (first, second))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            yield f"origin: {key}: {here.get(key, 'unknown')} here, {there.get(key, 'unknown')} there"


def _flat(session: dict[str, Any]) -> dict[str, Any]:
    """One level: `libraries` and `paths` are mappings themselves."""
    flat: dict[str, Any] = {}
    for key, value in session.items():
        flat |= {f"{key}: {inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat
