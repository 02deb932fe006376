"""A whole cache in one HDF5 file: easier to move and to archive; training reads it directly.

The hierarchy is that of FORMAT.md. A group's attributes are the dataset `attributes.json` (HDF5 limits its own
attributes to 64 kB), the labels are the dataset `annotations.json`, and arrays of frames are chunked by frame. All
datasets have HDF5's own Fletcher-32 checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import VIDEOS, fill_value, is_video_name
from cache.storage.contract import committed, require_finite
from cache.storage.shards import checked_output

ATTRIBUTES = "attributes.json"
PACKING = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""Of maps whose codec compresses."""
LIBRARY = ("v110", "v110")
"""HDF5 1.10's file format: all that describes the data has checksums too, not the data alone."""
EXPORT_HINT = "export the file again from its cache: `python -m cache export`"
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)  # what h5py makes of it


@contextmanager
def _readable(what: str, where: object) -> Iterator[None]:
    """Raise CorruptData for whatever a damaged file leads to in the block."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise CorruptData(f"{what}: {error}", where=where, hint=EXPORT_HINT) from error


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
        with _readable("unreadable", f"{self.path}: {group}"):
            datasets = {name: item for name, item in self.file.get(group, {}).items() if name != ATTRIBUTES}
            return {name: require_finite(item[...], f"{self.path}: {group}/{name}") for name, item in datasets.items()}

    def videos(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """See Store."""
        with _readable("unreadable", f"{self.path}: {VIDEOS}"):
            names = sorted(name for name in self.file.get(VIDEOS, {}) if name != ATTRIBUTES and is_video_name(name))
        for name in names:
            yield name, committed(self, name)

    def read_file(self, name: str) -> bytes | None:
        """See Store."""
        return self._bytes(name)

    def files(self) -> list[str]:
        """See Store."""
        with _readable("unreadable", self.path):
            items = self.file.items()
            return sorted(name for name, item in items if isinstance(item, h5py.Dataset) and name != ATTRIBUTES)

    def frames(self, video: str, field: str) -> Hdf5Frames:
        """See Store."""
        where = f"{self.path}: video {video!r}, {field}"
        with _readable("unreadable array", where):
            dataset = self.file[f"{VIDEOS}/{video}/{field}"]
            frames = Hdf5Frames(store=self, video=video, field=field, shape=dataset.shape, dtype=dataset.dtype)
            # HDF5 reads what was never written as fill values.
            written = dataset.id.get_num_chunks() if dataset.chunks == (1, *dataset.shape[1:]) else -1
        if written != dataset.shape[0]:
            what = (
                "array is not chunked by frame" if written < 0 else f"{written} of {dataset.shape[0]} frames are there"
            )
            raise CorruptData(what, where=where, hint=EXPORT_HINT)
        return frames

    def size(self, video: str, field: str) -> int:
        """See Store."""
        with _readable("unreadable array", f"{self.path}: video {video!r}, {field}"):
            return int(self.file[f"{VIDEOS}/{video}/{field}"].id.get_storage_size())

    def _bytes(self, name: str) -> bytes | None:
        with _readable("unreadable", f"{self.path}: {name}"):
            dataset = self.file.get(name)
            return None if dataset is None else bytes(dataset[...].tobytes())


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
        fill, place = np.array(fill_value(self.dtype), self.dtype), f"{self.store.path}: video {self.video!r}"
        with _readable(f"{self.field} unreadable", place):
            dataset = self.store.file[f"{VIDEOS}/{self.video}/{self.field}"]
        for row, frame in enumerate(frames):
            where = f"{place}, frame {frame}"
            with _readable(f"{self.field} unreadable", where):
                dataset.read_direct(out, np.s_[frame], np.s_[row])
            if _is_all(out[row], fill):
                raise CorruptData(f"{self.field}: frame was never written", where=where, hint=EXPORT_HINT)
        return out


def _is_all(values: NDArray[Any], fill: NDArray[Any]) -> bool:
    """Whether the fill value is all there is, as no frame of data can be (see `fill_value`)."""
    if not np.array_equal(values.flat[0], fill, equal_nan=True):
        return False
    return bool(np.isnan(values).all() if values.dtype.kind == "f" else (values == fill).all())
