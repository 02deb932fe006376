"""From where a cache lies to a local disk (the way into an object store: cache.upkeep.upload)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.errors import CacheError
from cache.layout import CODEC, DETECTOR, METADATA, VIDEOS, sync_to_disk
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.room import require_room
from cache.storage.connection import remote_url
from cache.storage.folder import FolderStore
from cache.storage.hdf5 import Hdf5Store
from cache.storage.locks import locked
from cache.storage.remote import REQUESTS, RemoteStore
from cache.writer import sync_tree

_TOO_LARGE = "the cache does not fit on the disk"
_NO_ROOM = "stage to another disk, or train without cache.stage_to: from where the cache lies"
FileStore = FolderStore | RemoteStore
"""What holds a cache as files."""


def stage(address: Path | str, folder: Path) -> Path:
    """Copy a cache into `folder` with a progress bar, but for the videos that are there as they are in the source.

    Videos are told apart by their attributes and the sizes of their files. An HDF5 file is copied into the folder
    under its own name. Returns what to read from. Raises CacheError where the disk is too small or `folder` is the
    source or no cache, and FingerprintMismatch where it holds other features.
    """
    feature_cache = FeatureCache.open(address)
    source = feature_cache.store
    if isinstance(source, Hdf5Store):
        return _stage_file(source.path, folder / source.path.name)
    assert isinstance(source, FileStore)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, FolderStore) and source.path.samefile(folder):
        raise CacheError("a cache cannot be staged into itself", where=address, hint="choose another folder")
    with locked(folder):
        if (folder / METADATA).exists():
            hint = "stage into another folder, or delete this one"
            FeatureCache.open(folder).fingerprint.require(feature_cache.fingerprint, where=folder, hint=hint)
        there = FolderStore(path=folder)
        files = stale(source, there)
        require_room(sum(sum(sizes.values()) for sizes in files.values()), folder, _TOO_LARGE, hint=_NO_ROOM)
        for name in files:  # All before the new labels come: old features must never be read by them.
            there.delete_video(name)
        fetch_all_but_videos(source, folder)
        for name in with_progress(files, f"stage to {folder}", unit="video"):
            _fetch_video(source, f"{VIDEOS}/{name}", files[name], folder)
    return folder


def local_copy(path: Path, stage_to: str | None) -> Path:
    """Where to read the cache at `path`: from itself, or from its copy below `stage_to` if it lies outside of it."""
    if stage_to is None or (remote_url(path) is None and path.resolve().is_relative_to(Path(stage_to).resolve())):
        return path
    return stage(path, staged_folder(path, stage_to))


def staged_folder(path: Path, stage_to: str) -> Path:
    """Where the copy of a cache lies: below a folder of its address or path, so that no two share one."""
    url = remote_url(path)
    return Path(stage_to, *(path.resolve().parts[1:] if url is None else url.partition("://")[2].split("/")))


def fetch_all_but_videos(source: FileStore, folder: Path) -> None:
    """Copy heads, codec, labels and what else lies beside the root, which comes last."""
    groups = [*source.listing(f"{DETECTOR}/"), *source.listing(f"{CODEC}/"), f"{VIDEOS}/{METADATA}"]
    _fetch_all(source, [*groups, *source.files()], folder)
    _fetch(source, METADATA, folder)


def stale(source: FileStore, target: FileStore) -> dict[str, dict[str, int]]:
    """The files (name -> bytes) of every complete video that is not in the target as it is in the source."""
    attributes, there = ({name: found for name, found in store.videos() if found} for store in (source, target))
    wanted, present = (_by_video(store.listing(f"{VIDEOS}/")) for store in (source, target))
    return {
        name: wanted[name]
        for name in attributes
        if name in wanted and (there.get(name) != attributes[name] or present.get(name) != wanted[name])
    }


def _by_video(listing: dict[str, int]) -> dict[str, dict[str, int]]:
    files: dict[str, dict[str, int]] = {}
    for name, size in listing.items():
        files.setdefault(name.split("/")[1], {})[name] = size
    return files


def _stage_file(file: Path, copy: Path) -> Path:
    """Copy a file unless size and time of modification are those of the copy."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with locked(copy.parent):
        status, known = file.stat(), copy.stat() if copy.exists() else None
        if known is None or (known.st_size, known.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            require_room(status.st_size, copy.parent, _TOO_LARGE, hint=_NO_ROOM)
            temporary = copy.with_name(f".{copy.name}.tmp")
            shutil.copy2(file, temporary)
            temporary.replace(copy)
    return copy


def _fetch_video(source: FileStore, group: str, files: Iterable[str], folder: Path) -> None:
    """All of a video's files in parallel, the commit marker last."""
    marker = f"{group}/{METADATA}"
    _fetch_all(source, [name for name in files if name != marker], folder)
    sync_tree(folder / group)
    _fetch(source, marker, folder)


def _fetch_all(source: FileStore, names: list[str], folder: Path) -> None:
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        list(pool.map(lambda name: _fetch(source, name, folder), names))


def _fetch(source: FileStore, name: str, folder: Path) -> None:
    """Copy a file; it appears under its name when it is whole."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    source.fetch(name, temporary)
    sync_to_disk(temporary)
    temporary.replace(target)
    sync_to_disk(target.parent)
