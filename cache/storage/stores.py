"""Where a cache lies: the one interface that reading needs, and its form on disk, a folder.

`open_store` decides by the path alone: `s3://`, `gs://` and other addresses are remote (cache.storage.remote), `x.h5`
is one HDF5 file (cache.storage.hdf5), and so is `x` where there is no such folder but a file `x.h5`. Everything else is
a folder. Stores are picklable and open nothing before they are first read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import METADATA, VIDEOS, is_video_name, read_group_attributes, sync_to_disk
from cache.storage.frames import FrameArray, open_frames

HDF5_SUFFIX = ".h5"


class Store(Protocol):
    """A cache's groups, by their names in FORMAT.md: "" is the root, "videos/7" a video."""

    @property
    def path(self) -> Path:
        """What errors call it."""
        ...

    def attributes(self, group: str) -> dict[str, Any] | None:
        """Attributes of a group, None where there is no such group. Raises CorruptData if unreadable."""
        ...

    def arrays(self, group: str) -> dict[str, NDArray[Any]]:
        """All small arrays of a group, whole. Raises CorruptData for damaged or missing bytes."""
        ...

    def videos(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """(name, see `committed`) of every video, sorted by name."""
        ...

    def read_file(self, name: str) -> bytes | None:
        """The bytes of what lies beside the root, such as the label file; None where there is none."""
        ...

    def files(self) -> list[str]:
        """Names of the files beside the root: labels, and records such as calibration.json; sorted."""
        ...

    def frames(self, video: str, field: str) -> FrameArray:
        """A field of a video. Raises CorruptData where its metadata are unreadable."""
        ...

    def size(self, video: str, field: str) -> int:
        """Stored bytes of a field of a video."""
        ...


def is_record(name: str) -> bool:
    """Whether a file at the top of a cache is neither the root's own nor hidden."""
    return name != METADATA and not name.startswith(".")


def committed(store: Store, video: str) -> dict[str, Any] | None:
    """The attributes of a complete video, None for any other; metadata that cannot be read carry no commit marker."""
    try:
        attributes = store.attributes(f"{VIDEOS}/{video}") or {}
    except CorruptData:
        return None
    return attributes if attributes.get("complete") is True else None


def open_store(path: Path | str) -> Store:
    """The store that a path names; whether there is a cache in it shows when it is read."""
    from cache.storage.connection import remote_url
    from cache.storage.remote import RemoteStore

    url = remote_url(path)
    if url is not None:
        return RemoteStore(url=url)
    local = Path(path)
    beside = Path(f"{local}{HDF5_SUFFIX}")
    if local.suffix == HDF5_SUFFIX or (not (local / METADATA).exists() and beside.is_file()):
        from cache.storage.hdf5 import Hdf5Store

        return Hdf5Store(local if local.suffix == HDF5_SUFFIX else beside)
    return FolderStore(path=local)


def extraction_store(path: Path | str) -> Store:
    """The store that an extraction to `path` begins or continues: an address or a folder, never a file beside it."""
    from cache.storage.connection import remote_url
    from cache.storage.remote import RemoteStore

    url = remote_url(path)
    return FolderStore(path=Path(path)) if url is None else RemoteStore(url=url)


@dataclass(frozen=True, kw_only=True)
class FolderStore:
    """A cache in a folder: the form that extraction writes and the fast reader reads."""

    path: Path

    def attributes(self, group: str) -> dict[str, Any] | None:
        """See Store."""
        return read_group_attributes(f"{self.path}/{group}")

    def arrays(self, group: str) -> dict[str, NDArray[Any]]:
        """See Store."""
        folder = self.path / group
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        return {name: self._array(folder / name) for name in names}

    def videos(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """See Store."""
        folder = self.path / VIDEOS
        if folder.is_dir():
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir() and is_video_name(entry.name))
            for name in names:
                yield name, committed(self, name)

    def read_file(self, name: str) -> bytes | None:
        """See Store."""
        file = self.path / name
        return file.read_bytes() if file.exists() else None

    def frames(self, video: str, field: str) -> FrameArray:
        """See Store."""
        return open_frames(self.path.joinpath(VIDEOS, video, field))

    def size(self, video: str, field: str) -> int:
        """See Store."""
        return sum(self.listing(f"{VIDEOS}/{video}/{field}/").values())

    def listing(self, prefix: str) -> dict[str, int]:
        """Names and bytes of all files in a folder, given as `videos/`, or of all of the cache for ""."""
        found = {}
        for folder, _, names in os.walk(self.path / prefix, followlinks=True):
            for name in names:
                file = Path(folder, name)
                with suppress(FileNotFoundError):  # Another process has removed it.
                    found[str(file.relative_to(self.path))] = file.stat().st_size
        return found

    def files(self) -> list[str]:
        """See Store."""
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file() and is_record(entry.name))

    def delete_video(self, name: str) -> None:
        """Delete all of a video, the commit marker first: where it is stopped it leaves an unfinished video."""
        folder = self.path / VIDEOS / name
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            (folder / METADATA).unlink(missing_ok=True)
            sync_to_disk(folder)
            shutil.rmtree(folder)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file's bytes to the file `target`."""
        shutil.copyfile(self.path / name, target)

    def _array(self, folder: Path) -> NDArray[Any]:
        try:
            array = np.asarray(zarr.open_array(str(folder), mode="r")[...])
        except Exception as error:  # damaged metadata can fail anywhere in their reader
            raise CorruptData(f"unreadable: {error}", where=folder) from error
        return require_finite(array, folder)


def require_finite(array: NDArray[Any], where: object) -> NDArray[Any]:
    """The array; raises CorruptData for NaN (Zarr's mark of what was never written) or infinity in it."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CorruptData("missing or non-finite numbers", where=where)
    return array
