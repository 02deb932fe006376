"""Room on a disk: what is free, and refusing to begin what does not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cache.errors import CacheError


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_possible(folder: Path) -> None:
    """Raise CacheError where a folder that is not there yet cannot be made: a file is in the way, or a permission."""
    above = existing_folder(folder)
    if not above.is_dir():
        what, hint = "a file is where a folder is to be made", "choose another cache.path"
        raise CacheError(what, where=folder, got=f"file {above}", hint=hint)
    if above != folder.absolute() and not os.access(above, os.W_OK | os.X_OK):
        what, hint = "the folder cannot be made", "choose another cache.path, or make that writable"
        raise CacheError(what, where=folder, got=f"{above} cannot be written", hint=hint)


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
