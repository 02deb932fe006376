"""Room on a disk: what is free, and refusing to begin what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from cache.errors import CacheError


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Room on the disk where `path` is or will be."""
    return shutil.disk_usage(existing_folder(path)).free


def in_units(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def require_room(needed: int, folder: Path, what: str, *, hint: str) -> None:
    """Raise CacheError saying `what` does not fit, where more bytes are needed than are free."""
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            what,
            where=folder,
            expected=in_units(needed),
            got=f"{in_units(free)} free",
            hint=hint,
        )
