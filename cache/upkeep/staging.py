"""From a remote cache to a local disk (the way back: cache.upkeep.upload)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.errors import CacheError
from cache.layout import CODEC, DETECTOR, METADATA, VIDEOS, write_file_atomically
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.storage.connection import remote_url
from cache.storage.locks import locked
from cache.storage.remote import REQUESTS, RemoteStore
from cache.storage.stores import FolderStore, committed
from cache.writer import sync_tree


def stage(address: Path | str, folder: Path) -> Path:
    """Copy a remote cache into `folder` with a progress bar; videos that are there already are not copied again.

    Returns `folder`. Raises CacheError where the address is local or the folder holds another cache, and
    FingerprintMismatch where it holds other features.
    """
    feature_cache = FeatureCache.open(address)
    store = feature_cache.store
    if not isinstance(store, RemoteStore):
        raise CacheError("nothing to stage: the cache is local", where=address)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / METADATA).exists():
            there = FeatureCache.open(folder).fingerprint
            hint = "stage into another folder, or delete this one"
            there.require(feature_cache.fingerprint, where=folder, hint=hint)
        fetch_all_but_videos(store, folder)
        local = FolderStore(path=folder)
        names = [name for name in feature_cache.video_names() if not committed(local, name)]
        for name in with_progress(names, f"stage to {folder}", unit="video"):
            _fetch_video(store, f"{VIDEOS}/{name}", folder)
    return folder


def local_copy(path: Path, stage_to: str | None) -> Path:
    """Where to read the cache at `path`: from itself, or from its copy below `stage_to` if it is remote."""
    return path if stage_to is None or remote_url(path) is None else stage(path, staged_folder(path, stage_to))


def staged_folder(path: Path, stage_to: str) -> Path:
    """Where the copy of a remote cache lies: below a folder of its address, so that no two share one."""
    return Path(stage_to, *str(remote_url(path)).partition("://")[2].split("/"))


def fetch_all_but_videos(store: RemoteStore, folder: Path) -> None:
    """Copy heads, codec, labels and what else lies beside the root, which comes last."""
    _fetch_all(store, [*store.listing(f"{DETECTOR}/"), *store.listing(f"{CODEC}/"), f"{VIDEOS}/{METADATA}"], folder)
    _fetch_all(store, [name for name in store.files() if name != METADATA], folder)
    _fetch(store, METADATA, folder)


def _fetch_video(store: RemoteStore, group: str, folder: Path) -> None:
    """All of a video's files in parallel, the commit marker last."""
    marker = f"{group}/{METADATA}"
    _fetch_all(store, [name for name in store.listing(f"{group}/") if name != marker], folder)
    sync_tree(folder / group)
    _fetch(store, marker, folder)


def _fetch_all(store: RemoteStore, names: list[str], folder: Path) -> None:
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        list(pool.map(lambda name: _fetch(store, name, folder), names))


def _fetch(store: RemoteStore, name: str, folder: Path) -> None:
    content = store.get(name)
    if content is None:
        raise CacheError("the object vanished while it was copied", where=f"{store.url}/{name}")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(folder / name, content)
