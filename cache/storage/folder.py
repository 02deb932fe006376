"""A cache on disk: the form that extraction writes and the fast reader reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import METADATA, VIDEOS, is_video_name, read_group_attributes, sync_to_disk
from cache.storage.contract import committed, is_record, require_finite
from cache.storage.frames import FrameArray, open_frames


@dataclass(frozen=True, kw_only=True)
class FolderStore:
    """A cache in a folder; picklable, and opens nothing before it is first read."""

    path: Path

    def attributes(self, group: str) -> dict[str, Any] | None:
        """See Store."""
        return read_group_attributes(f"{self.path}/{group}".rstrip("/"))

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
