"""Between a remote cache and a folder: `stage` brings one to a local disk, `upload` takes one there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from cache.errors import CacheError
from cache.layout import ANNOTATIONS, CODEC, DETECTOR, METADATA, VIDEOS, is_complete, write_file_atomically
from cache.reader import FeatureCache
from cache.remote import RemoteStore, remote_url
from cache.stores import FolderStore
from cache.writer import locked, sync_tree

_REQUESTS = 16


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
    with locked(folder, wait=True):
        if (folder / METADATA).exists():
            there = FeatureCache.open(folder).fingerprint
            hint = "stage into another folder, or delete this one"
            there.require(feature_cache.fingerprint, where=folder, hint=hint)
        _fetch_all(store, store.listing(f"{DETECTOR}/") + store.listing(f"{CODEC}/"), folder)
        _fetch(store, f"{VIDEOS}/{METADATA}", folder)
        names = [name for name in feature_cache.video_names() if not is_complete(folder / VIDEOS / name)]
        for name in tqdm(names, desc=f"stage to {folder}", unit="video", delay=1):
            _fetch_video(store, f"{VIDEOS}/{name}", folder)
        if store.annotations() is not None:
            _fetch(store, ANNOTATIONS, folder)
        _fetch(store, METADATA, folder)
    return folder


def local_copy(path: Path, stage_to: str | None) -> Path:
    """Where to read the cache at `path`: from itself, or from its copy below `stage_to` if it is remote."""
    return path if stage_to is None or remote_url(path) is None else stage(path, Path(stage_to) / path.name)


def _fetch_video(store: RemoteStore, group: str, folder: Path) -> None:
    """All of a video's files, at a time, the commit marker last."""
    marker = f"{group}/{METADATA}"
    _fetch_all(store, [name for name in store.listing(f"{group}/") if name != marker], folder)
    sync_tree(folder / group)
    _fetch(store, marker, folder)


def _fetch_all(store: RemoteStore, names: list[str], folder: Path) -> None:
    with ThreadPoolExecutor(max_workers=_REQUESTS) as pool:
        list(pool.map(lambda name: _fetch(store, name, folder), names))


def _fetch(store: RemoteStore, name: str, folder: Path) -> None:
    content = store.get(name)
    if content is None:
        raise CacheError("the object vanished while it was copied", where=f"{store.url}/{name}")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(folder / name, content)


def upload(folder: Path, address: str) -> None:
    """Copy the complete videos and all else of the cache in `folder` to an address; the root comes last.

    Videos that are complete there are not copied again. Raises FingerprintMismatch where the address holds
    other features.
    """
    feature_cache = FeatureCache.open(folder)
    if not isinstance(feature_cache.store, FolderStore):
        raise CacheError("only a cache in a folder can be uploaded", where=folder)
    target = RemoteStore(url=address)
    if target.attributes("") is not None:
        hint = "upload to another address, or delete what is there"
        FeatureCache.open(address).fingerprint.require(feature_cache.fingerprint, where=address, hint=hint)
    _put_all(target, folder, [file for group in (DETECTOR, CODEC) for file in (folder / group).rglob("*")])
    target.put(f"{VIDEOS}/{METADATA}", folder / VIDEOS / METADATA)
    there = {name for name, complete in target.videos() if complete}
    names = [name for name in feature_cache.video_names() if name not in there]
    for name in tqdm(names, desc=f"upload to {address}", unit="video", delay=1):
        _put_video(target, folder, f"{VIDEOS}/{name}")
    if (folder / ANNOTATIONS).exists():
        target.put(ANNOTATIONS, folder / ANNOTATIONS)
    target.put(METADATA, folder / METADATA)


def _put_video(target: RemoteStore, folder: Path, group: str) -> None:
    """All of a video's files, at a time, the commit marker last."""
    marker = folder / group / METADATA
    _put_all(target, folder, [file for file in (folder / group).rglob("*") if file != marker])
    target.put(f"{group}/{METADATA}", marker)


def _put_all(target: RemoteStore, folder: Path, entries: list[Path]) -> None:
    with ThreadPoolExecutor(max_workers=_REQUESTS) as pool:
        files = [entry for entry in entries if entry.is_file()]
        list(pool.map(lambda file: target.put(str(file.relative_to(folder)), file), files))
