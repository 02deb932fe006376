"""A whole cache in one HDF5 file: easier to move and to archive; training reads it directly.

The hierarchy is that of FORMAT.md. A group's attributes are the dataset `attributes.json` (HDF5 limits its own
attributes to 64 kB), the labels are the dataset `annotations.json`, and arrays of frames are chunked by frame. All
datasets have HDF5's own Fletcher-32 checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import VIDEOS
from cache.storage.shards import checked_output
from cache.storage.stores import committed, require_finite

ATTRIBUTES = "attributes.json"
PACKING = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""Of maps whose codec compresses."""
EXPORT_HINT = "export the file again from its cache: `python -m cache export`"


class Hdf5Store:
    """A cache in an HDF5 file, which every process opens for itself, when it first reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file."""
        return {"path": self.path, "_file": None, "_process": 0}

    @property
    def file(self) -> h5py.File:
        """The file, opened by this process: handles do not survive a fork. Raises CorruptData for no HDF5."""
        if self._file is None or self._process != os.getpid():
            try:
                self._file, self._process = h5py.File(self.path, "r", locking=False), os.getpid()
            except FileNotFoundError:
                raise
            except OSError as error:
                raise CorruptData(f"not a readable HDF5 file: {error}", where=self.path) from error
        return self._file

    def attributes(self, group: str) -> dict[str, Any] | None:
        """See Store."""
        if not self.path.exists():
            return None
        content = self._bytes(f"{group}/{ATTRIBUTES}")
        try:
            attributes = None if content is None else json.loads(content)
        except ValueError as error:
            raise CorruptData(f"unreadable group metadata: {error!r}", where=f"{self.path}: {group}") from error
        return attributes if isinstance(attributes, dict) else None

    def arrays(self, group: str) -> dict[str, NDArray[Any]]:
        """See Store."""
        names = [name for name in self.file.get(group, {}) if name != ATTRIBUTES]
        try:
            return {name: require_finite(self.file[group][name][...], f"{self.path}: {group}/{name}") for name in names}
        except (OSError, KeyError, RuntimeError) as error:
            raise CorruptData(f"unreadable: {error}", where=f"{self.path}: {group}") from error

    def videos(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """See Store."""
        for name in sorted(self.file.get(VIDEOS, {})):
            if name != ATTRIBUTES:
                yield name, committed(self, name)

    def read_file(self, name: str) -> bytes | None:
        """See Store."""
        return self._bytes(name)

    def files(self) -> list[str]:
        """See Store."""
        return sorted(name for name, item in self.file.items() if isinstance(item, h5py.Dataset) and name != ATTRIBUTES)

    def frames(self, video: str, field: str) -> Hdf5Frames:
        """See Store."""
        where = f"{self.path}: video {video!r}, {field}"
        try:
            dataset = self.file[f"{VIDEOS}/{video}/{field}"]
            frames = Hdf5Frames(store=self, video=video, field=field, shape=dataset.shape, dtype=dataset.dtype)
            # HDF5 reads what was never written as zeros.
            written = dataset.id.get_num_chunks() if dataset.chunks == (1, *dataset.shape[1:]) else -1
        except (KeyError, OSError, AttributeError, RuntimeError) as error:
            raise CorruptData(f"unreadable array: {error}", where=where, hint=EXPORT_HINT) from error
        if written != dataset.shape[0]:
            what = (
                "array is not chunked by frame" if written < 0 else f"{written} of {dataset.shape[0]} frames are there"
            )
            raise CorruptData(what, where=where, hint=EXPORT_HINT)
        return frames

    def size(self, video: str, field: str) -> int:
        """See Store."""
        return int(self.file[f"{VIDEOS}/{video}/{field}"].id.get_storage_size())

    def _bytes(self, name: str) -> bytes | None:
        try:
            dataset = self.file.get(name)
            return None if dataset is None else bytes(dataset[...].tobytes())
        except (OSError, RuntimeError) as error:
            raise CorruptData(f"unreadable: {error}", where=f"{self.path}: {name}") from error


@dataclass(frozen=True, kw_only=True)
class Hdf5Frames:
    """A field of a video; see frames.FrameArray."""

    store: Hdf5Store
    video: str
    field: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See FrameArray. HDF5 verifies the checksums."""
        out = checked_output(self.shape, self.dtype, frames, out)
        dataset = self.store.file[f"{VIDEOS}/{self.video}/{self.field}"]
        for row, frame in enumerate(frames):
            try:
                dataset.read_direct(out, np.s_[frame], np.s_[row])
            except (OSError, RuntimeError) as error:
                where = f"{self.store.path}: video {self.video!r}, frame {frame}"
                raise CorruptData(f"{self.field} unreadable: {error}", where=where, hint=EXPORT_HINT) from error
        return out
