"""Copying a cache in a folder into an object store (the way back: cache.upkeep.staging)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.errors import CacheError
from cache.layout import ANNOTATIONS, CODEC, DETECTOR, METADATA, VIDEOS
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.storage.remote import REQUESTS, RemoteStore
from cache.storage.stores import FolderStore
from cache.writer import check_continuation, video_sources


def upload(folder: Path, address: str) -> None:
    """Copy the complete videos and all else of the cache in `folder` to an address.

    Videos that are complete there are not copied again. Raises FingerprintMismatch where the address holds
    other features.
    """
    feature_cache = FeatureCache.open(folder)
    if not isinstance(feature_cache.store, FolderStore):
        raise CacheError("only a cache in a folder can be uploaded", where=folder)
    target = RemoteStore(url=address)
    there = set[str]()
    if target.attributes("") is not None:
        labels = feature_cache.store.read_file(ANNOTATIONS)
        sources = {} if labels is None else video_sources(labels)
        there = check_continuation(target, feature_cache.fingerprint, sources)
    put_all_but_videos(target, folder)
    names = [name for name in feature_cache.video_names() if name not in there]
    for name in with_progress(names, f"upload to {address}", unit="video"):
        put_video(target, folder, name)


def put_all_but_videos(target: RemoteStore, folder: Path) -> None:
    """Heads, codec, labels and what else lies beside the root, which comes last."""
    beside = [file for file in folder.iterdir() if file.name != METADATA and not file.name.startswith(".")]
    groups = [file for group in (DETECTOR, CODEC) for file in (folder / group).rglob("*")]
    _put_all(target, folder, [*groups, folder / VIDEOS / METADATA, *beside])
    target.put(METADATA, folder / METADATA)


def put_video(target: RemoteStore, folder: Path, name: str) -> None:
    """All of a video's files in parallel, the commit marker last."""
    group = folder / VIDEOS / name
    _put_all(target, folder, [file for file in group.rglob("*") if file != group / METADATA])
    target.put(f"{VIDEOS}/{name}/{METADATA}", group / METADATA)


def _put_all(target: RemoteStore, folder: Path, entries: list[Path]) -> None:
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        files = [entry for entry in entries if entry.is_file()]
        list(pool.map(lambda file: target.put(str(file.relative_to(folder)), file), files))
