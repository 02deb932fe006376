"""Copying a cache in a folder into an object store (the way back: cache.upkeep.staging)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.errors import CacheError, FingerprintMismatch, VideoBusy, some
from cache.layout import ANNOTATIONS, CODEC, DETECTOR, METADATA, VIDEOS
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.storage.connection import remote_url
from cache.storage.folder import FolderStore
from cache.storage.hdf5 import Hdf5Store
from cache.storage.remote import REQUESTS, RemoteStore
from cache.upkeep.staging import stale
from cache.writer import check_continuation, video_sources


def upload(folder: Path, address: str, *, replace: bool = False) -> None:
    """Copy the complete videos and all else of the cache in `folder` to an address.

    Videos that are there as they are here, by their attributes and the sizes of their files, are not copied again;
    others are replaced. Where all that both hold differ, only `replace` does so: it may be another data set. Raises
    FingerprintMismatch there, where the address holds other features, or videos that are not here and show other
    frames than the labels list; CacheError where `folder` is no folder or `address` no address.
    """
    feature_cache = FeatureCache.open(folder)
    store, url = feature_cache.store, remote_url(address)
    if not isinstance(store, FolderStore):
        first = f"python -m cache {'import' if isinstance(store, Hdf5Store) else 'stage'} {folder} FOLDER"
        raise CacheError("only a cache in a folder can be uploaded", where=folder, hint=f"first `{first}`")
    if url is None:
        raise CacheError("not an address", where=address, expected="s3://..., gs://... or az://...")
    target = RemoteStore(url=url)
    names = feature_cache.video_names()
    if target.attributes("") is not None:
        names = _replaceable(feature_cache, target, replace=replace)
    put_all_but_videos(target, folder)
    for name in with_progress(names, f"upload to {address}", unit="video"):
        put_video(target, folder, name)


def _replaceable(feature_cache: FeatureCache, target: RemoteStore, *, replace: bool) -> list[str]:
    """Names of the videos to copy; those that are there as something else are marked as incomplete."""
    store, here = feature_cache.store, set(feature_cache.video_names())
    assert isinstance(store, FolderStore)
    labels = store.read_file(ANNOTATIONS)
    sources = {} if labels is None else video_sources(labels)
    there = check_continuation(target, feature_cache.fingerprint, sources, replaced=here)
    names = list(stale(store, target))
    replaced = [name for name in names if name in there]
    if replaced and not replace and len(replaced) == len(here & there):
        what = f"all videos that are there too are others than here: {some(replaced)}"
        hint = "another data set needs another address; if these are to be replaced, add --replace"
        raise FingerprintMismatch(what, where=target.url, hint=hint)
    # Before the new labels come: old features must never be read by them.
    target.delete([f"{VIDEOS}/{name}/{METADATA}" for name in replaced])
    return names


def put_all_but_videos(target: RemoteStore, folder: Path) -> None:
    """Heads, codec, labels and what else lies beside the root, which comes last."""
    beside = [file for file in folder.iterdir() if file.name != METADATA and not file.name.startswith(".")]
    groups = [file for group in (DETECTOR, CODEC) for file in (folder / group).rglob("*")]
    _put_all(target, folder, [*groups, folder / VIDEOS / METADATA, *beside])
    target.put(METADATA, folder / METADATA)


def put_video(target: RemoteStore, folder: Path, name: str) -> None:
    """All of a video's files in parallel, the commit marker last; what else an earlier upload left of it is deleted.

    Raises VideoBusy where files are missing there in the end: another process prunes or uploads this video.
    """
    group = folder / VIDEOS / name
    sizes = _put_all(target, folder, [file for file in group.rglob("*") if file != group / METADATA])
    marker = f"{VIDEOS}/{name}/{METADATA}"
    found = target.listing(f"{VIDEOS}/{name}/")
    target.delete(sorted(found.keys() - sizes.keys() - {marker}))
    if lost := [file for file in sizes if found.get(file) != sizes[file]]:
        hint = "let the other process end, then run the same command again"
        what = f"another process deletes or replaces what is uploaded: {some(lost)}"
        raise VideoBusy(what, where=f"{target.url}/{VIDEOS}/{name}", hint=hint)
    target.put(marker, group / METADATA)


def _put_all(target: RemoteStore, folder: Path, entries: list[Path]) -> dict[str, int]:
    """Returns the names of what was put, and the bytes."""
    files = {str(entry.relative_to(folder)): entry for entry in entries if entry.is_file()}
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        list(pool.map(target.put, files, files.values()))
    return {name: file.stat().st_size for name, file in files.items()}
