"""Keeping caches in order: what may go (`prune`), what sets two apart (`diff`), older formats (`upgrade`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import CacheError, CorruptData, VideoBusy, VitaCacheError, first_line, some
from cache.heads import HEAD_SHAPES
from cache.layout import ANNOTATIONS, FORMAT_VERSION, METADATA, VIDEOS
from cache.reader import FeatureCache, Root
from cache.storage.contract import Store, committed
from cache.storage.folder import FolderStore
from cache.storage.locks import VideoLocks
from cache.storage.remote import RemoteStore
from cache.storage.stores import open_store
from cache.upkeep.staging import FileStore
from cache.writer import video_sources

ORPHANED, UNFINISHED = f"not in {ANNOTATIONS}", "extraction did not finish"
UNREADABLE = f"its {METADATA} is damaged, so that nobody knows whether it is complete"
IDLE = timedelta(hours=1)
"""How long nothing must have been put of an incomplete video at an address before it is pruned."""


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """A video that no reader and no label asks for."""

    store: FileStore
    name: str
    reason: str
    bytes: int

    @property
    def where(self) -> str:
        """Its folder or address."""
        place = self.store.url if isinstance(self.store, RemoteStore) else self.store.path
        return f"{place}/{VIDEOS}/{self.name}"


def prunable(feature_cache: FeatureCache) -> list[Prunable]:
    """Videos whose extraction did not finish, whose marker is damaged, or that the labels no longer name (with views).

    Without labels in the cache nothing is orphaned. Raises CacheError for an HDF5 file.
    """
    store = feature_cache.store
    if not isinstance(store, FileStore):
        hint = "prune the folder that it was exported from, and export that again"
        raise CacheError("an HDF5 file cannot be pruned", where=feature_cache.path, hint=hint)
    labels = store.read_file(ANNOTATIONS)
    known = None if labels is None else video_sources(labels)
    found = []
    for name, complete in store.videos():
        orphaned = known is not None and name.partition("@")[0] not in known
        if complete and not orphaned:
            continue
        reason = ORPHANED if orphaned else UNFINISHED if _is_readable(store, name) else UNREADABLE
        size = sum(store.listing(f"{VIDEOS}/{name}/").values())
        found.append(Prunable(store=store, name=name, reason=reason, bytes=size))
    return found


def _is_readable(store: Store, name: str) -> bool:
    try:
        store.attributes(f"{VIDEOS}/{name}")
    except CorruptData:
        return False
    return True


def prune(found: list[Prunable]) -> list[VideoBusy]:
    """Delete the videos, but for those that have been finished meanwhile: folders under their locks, objects if idle.

    Returns what was left, because other processes write it.
    """
    busy = []
    for entry in found:
        try:
            if isinstance(entry.store, RemoteStore):
                _prune_objects(entry.store, entry)
            else:
                _prune_folder(entry.store, entry)
        except VideoBusy as error:
            busy.append(error)
    return busy


def _prune_folder(store: FolderStore, entry: Prunable) -> None:
    with VideoLocks(store.path).held(entry.name):
        if entry.reason == ORPHANED or not committed(store, entry.name):
            store.delete_video(entry.name)


def _prune_objects(store: RemoteStore, entry: Prunable) -> None:
    """Raises VideoBusy for what is incomplete and new: there are no locks, so an upload may be putting the rest."""
    complete, last = committed(store, entry.name), store.last_put(f"{VIDEOS}/{entry.name}/")
    if last is None or (complete and entry.reason != ORPHANED):
        return
    age = datetime.now(UTC) - last
    if not complete and age < IDLE:
        what = f"put {age.total_seconds() / 60:.0f} minutes ago, so an upload may still be running"
        hint = f"nothing is locked in an object store: prune when {IDLE.total_seconds() / 60:.0f} minutes have passed"
        raise VideoBusy(what, where=entry.where, hint=hint)
    store.delete_video(entry.name)


def upgrade(path: Path | str) -> str:
    """Convert a cache of an older format to the newest, in place; returns what was done.

    Format 1 is the only one so far. A later format adds its step here: it rewrites what differs and the root last.
    Raises FormatVersionError for a format that this release does not know.
    """
    Root.read(open_store(path))
    return f"{path}: is format {FORMAT_VERSION} already: nothing to do"


def differences(first: FeatureCache, second: FeatureCache) -> Iterator[str]:
    """What sets two caches apart, in sentences: features, heads, videos, labels, and how they came about."""
    yield from (f"features: {line}" for line in first.fingerprint.differences(second.fingerprint))
    if first.root.codec_parameters != second.root.codec_parameters:
        yield f"codec parameters: {first.root.codec_parameters} here, {second.root.codec_parameters} there"
    yield from _head_differences(first, second)
    names = set(first.video_names()), set(second.video_names())
    for here, only in (("here", names[0] - names[1]), ("there", names[1] - names[0])):
        if only:
            yield f"videos: {len(only)} only {here}: {some(sorted(only))}"
    both = sorted(names[0] & names[1])
    shown = [{name: _shown(feature_cache, name) for name in both} for feature_cache in (first, second)]
    for here, videos in zip(("here", "there"), shown, strict=True):
        if unreadable := [name for name in both if videos[name] is None]:
            yield f"videos: {len(unreadable)} cannot be read {here}: {some(unreadable)}"
    other_frames = [name for name in both if None not in (pair := [s[name] for s in shown]) and pair[0] != pair[1]]
    others = [name for name in both if name not in other_frames and _hold_other_numbers(first, second, name)]
    if others:
        yield f"videos: {len(others)} hold other numbers, such as {some(others)}"
    if other_frames:
        yield f"videos: {len(other_frames)} show other frames, such as {some(other_frames)}"
    if first.store.read_file(ANNOTATIONS) != second.store.read_file(ANNOTATIONS):
        yield "labels: the label files differ"
    yield from _origins(first.root.sessions, second.root.sessions)


def _head_differences(first: FeatureCache, second: FeatureCache) -> Iterator[str]:
    heads = []
    for here, feature_cache in (("here", first), ("there", second)):
        try:
            heads.append(feature_cache.heads)
        except VitaCacheError as error:
            yield f"heads: cannot be read {here}: {first_line(error)}"
    if len(heads) < 2:
        return
    if heads[0].category_names != heads[1].category_names:
        yield "heads: the category names differ"
    others = [name for name in HEAD_SHAPES if not np.array_equal(heads[0].arrays[name], heads[1].arrays[name])]
    if others:
        yield f"heads: other numbers in {some(others)}"


def _shown(feature_cache: FeatureCache, name: str) -> tuple[object, ...] | None:
    """What identifies a video's frames, None where it cannot be read."""
    try:
        video = feature_cache.video(name)
    except VitaCacheError:
        return None
    return video.source, video.attributes


def _hold_other_numbers(first: FeatureCache, second: FeatureCache, name: str) -> bool:
    """Whether the checksums of a video's contents differ; caches of earlier versions have none."""
    try:
        checksums = [feature_cache.video(name).checksums for feature_cache in (first, second)]
    except VitaCacheError:
        return False
    return None not in checksums and checksums[0] != checksums[1]


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
