"""A cache as one HDF5 file and back, byte for byte."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.errors import CacheError, CorruptData
from cache.layout import (
    AXES,
    CODEC,
    DETECTOR,
    FRAME_QUERIES,
    MASK_FEATURES,
    METADATA,
    VIDEOS,
    fill_value,
    group_metadata,
    shard_ranges,
    sync_to_disk,
    write_file_atomically,
)
from cache.progress import with_progress
from cache.reader import CachedVideo, FeatureCache
from cache.room import require_room
from cache.storage.contract import Store
from cache.storage.hdf5 import ATTRIBUTES, LIBRARY, PACKING, Hdf5Store
from cache.storage.locks import locked
from cache.storage.shard_layout import content_checksum
from cache.storage.shard_writer import ShardWriter, write_array
from cache.storage.stores import HDF5_SUFFIX
from cache.writer import sync_tree

_MARGIN = 1 << 20  # bytes, for what describes the frames
_NO_ROOM = "choose a place on another disk"


def export_hdf5(feature_cache: FeatureCache, file: Path) -> None:
    """Write the complete videos and all else of a cache to one HDF5 file, which appears only when it is whole.

    Raises CacheError where the file exists or does not end in .h5, CorruptData where a stored frame is damaged.
    """
    if file.suffix != HDF5_SUFFIX:
        raise CacheError("only files that end in .h5 are read as HDF5", where=file, hint=f"export to {file.stem}.h5")
    if file.exists():
        raise CacheError("the file exists already", where=file, hint="delete it, or choose another name")
    _require_room(feature_cache, file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with ExitStack() as cleanup:
        cleanup.callback(temporary.unlink, missing_ok=True)
        with h5py.File(temporary, "w", libver=LIBRARY) as target:
            _export_rest(feature_cache.store, target)
            for name in with_progress(feature_cache.video_names(), "export", unit="video"):
                video = feature_cache.video(name)
                require_room(
                    _MARGIN + _unpacked_bytes(video),
                    file.parent,
                    f"video {name!r} does not fit on the disk",
                    hint=_NO_ROOM,
                )
                _export_video(video, feature_cache, target)
        sync_to_disk(temporary)
        temporary.replace(file)
    sync_to_disk(file.parent)


def _export_rest(store: Store, target: h5py.File) -> None:
    for name in store.files():
        _put(target, name, store.read_file(name) or b"")
    for group in ("", DETECTOR, CODEC, VIDEOS):
        _put_attributes(target, group, store.attributes(group) or {})
        for name, array in store.arrays(group).items() if group in (DETECTOR, CODEC) else ():
            _put(target, f"{group}/{name}", array)


def _export_video(video: CachedVideo, feature_cache: FeatureCache, target: h5py.File) -> None:
    group = f"{VIDEOS}/{video.name}"
    _put_attributes(target, group, feature_cache.store.attributes(group) or {})
    for field, array in ((FRAME_QUERIES, video.queries), (MASK_FEATURES, video.maps)):
        packing: Mapping[str, Any] = PACKING if field == MASK_FEATURES and feature_cache.codec.compressed else {}
        packing = {"fletcher32": True, "fillvalue": fill_value(array.dtype), **packing}
        shape = array.shape
        dataset = target.create_dataset(f"{group}/{field}", shape, array.dtype, chunks=(1, *shape[1:]), **packing)
        checksum = 0
        for frames in shard_ranges(shape[0]):
            content = array.read(frames)
            checksum = content_checksum(content, checksum)
            dataset[frames.start : frames.stop] = content
        _require_content(video, field, checksum)


def _require_content(video: CachedVideo, field: str, checksum: int) -> None:
    """Raise CorruptData where these are not the elements that were extracted."""
    stated = video.checksums.get(field, checksum) if isinstance(video.checksums, dict) else checksum
    if stated != checksum:
        where = f"{video.store.path}: video {video.name!r}"
        raise CorruptData(
            f"{field} is not what was extracted",
            where=where,
            hint="`python -m cache verify` says more",
            expected=stated,
            got=checksum,
        )


def _unpacked_bytes(video: CachedVideo) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in (video.queries, video.maps))


def _require_room(feature_cache: FeatureCache, folder: Path) -> None:
    """Before anything is written: HDF5 cannot even close a file on a full disk."""
    fields = [(name, field) for name in feature_cache.video_names() for field in AXES]
    needed = _MARGIN + sum(feature_cache.store.size(name, field) for name, field in fields)
    require_room(needed, folder, "the cache does not fit on the disk", hint=_NO_ROOM)


def _put_attributes(target: h5py.File, group: str, attributes: Mapping[str, Any]) -> None:
    _put(target, f"{group}/{ATTRIBUTES}", json.dumps(attributes, ensure_ascii=False).encode())


def _put(target: h5py.File, name: str, content: bytes | NDArray[Any]) -> None:
    """Store bytes or a small array whole, with a checksum, which HDF5 has for chunks alone."""
    array = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
    chunked: dict[str, Any] = {"chunks": array.shape, "fletcher32": True} if array.size else {}
    target.create_dataset(name, data=array, **chunked)


def import_hdf5(file: Path, path: Path) -> None:
    """Write the cache that an HDF5 file holds to the folder `path`; the root comes last, as at extraction.

    Raises CacheError where the folder is not empty or the file holds no cache, CorruptData for damaged frames.
    """
    if path.exists() and any(path.iterdir()):
        hint = "import into a new folder, or delete this one if an import into it did not finish"
        raise CacheError("the folder is not empty", where=path, hint=hint)
    feature_cache = FeatureCache.open(file)
    if not isinstance(feature_cache.store, Hdf5Store):
        raise CacheError("not an HDF5 file", where=file, expected="a file that ends in .h5")
    store = feature_cache.store
    _require_room(feature_cache, path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        for name in store.files():
            write_file_atomically(path / name, store.read_file(name) or b"")
        for group in (DETECTOR, CODEC, VIDEOS):
            (path / group).mkdir()
            for name, array in store.arrays(group).items() if group != VIDEOS else ():
                write_array(path / group / name, array)
            write_file_atomically(path / group / METADATA, group_metadata(store.attributes(group) or {}))
        for name in with_progress(feature_cache.video_names(), "import", unit="video"):
            _import_video(feature_cache, name, path / VIDEOS / name)
        sync_tree(path)
        write_file_atomically(path / METADATA, group_metadata(store.attributes("") or {}))


def _import_video(feature_cache: FeatureCache, name: str, folder: Path) -> None:
    video = feature_cache.video(name)
    folder.mkdir()
    for field, array in ((FRAME_QUERIES, video.queries), (MASK_FEATURES, video.maps)):
        packed = field == MASK_FEATURES and feature_cache.codec.compressed
        example = np.empty((0, *array.shape[1:]), array.dtype)
        writer = ShardWriter(folder / field, array.shape[0], example, AXES[field], compressed=packed)
        for frames in shard_ranges(array.shape[0]):
            writer.append(array.read(frames))
        writer.finish()
        _require_content(video, field, writer.checksum)
    content = group_metadata(feature_cache.store.attributes(f"{VIDEOS}/{name}") or {})
    write_file_atomically(folder / METADATA, content)
