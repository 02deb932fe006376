"""Where a cache lies, by its path alone.

`s3://`, `gs://` and other addresses are remote (cache.storage.remote), `x.h5` is one HDF5 file (cache.storage.hdf5),
and so is `x` where there is no such folder but a file `x.h5`. Everything else is a folder (cache.storage.folder).
Stores are picklable and open nothing before they are first read.
"""

from __future__ import annotations

from pathlib import Path

from cache.layout import METADATA
from cache.storage.connection import remote_url
from cache.storage.contract import Store
from cache.storage.folder import FolderStore
from cache.storage.hdf5 import Hdf5Store
from cache.storage.remote import RemoteStore

HDF5_SUFFIX = ".h5"


def open_store(path: Path | str) -> Store:
    """The store that a path names; whether there is a cache in it shows when it is read."""
    url = remote_url(path)
    if url is not None:
        return RemoteStore(url=url)
    local = Path(path)
    beside = Path(f"{local}{HDF5_SUFFIX}")
    if local.suffix == HDF5_SUFFIX or (not (local / METADATA).exists() and beside.is_file()):
        return Hdf5Store(local if local.suffix == HDF5_SUFFIX else beside)
    return FolderStore(path=local)
