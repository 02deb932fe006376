"""What reading needs of a cache, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData
from cache.layout import METADATA, VIDEOS
from cache.storage.frames import FrameArray


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


def require_finite(array: NDArray[Any], where: object) -> NDArray[Any]:
    """The array; raises CorruptData for NaN (Zarr's mark of what was never written) or infinity in it."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CorruptData("missing or non-finite numbers", where=where)
    return array
