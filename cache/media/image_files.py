"""Images on disk as RGB: any mode and depth that Pillow reads, upright; folders and lists of them in order."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cache.errors import FrameError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2")
_ORIENTATION = 0x0112  # EXIF; values from 5 on lie on their side
_UNREADABLE = (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)


def to_rgb(image: Image.Image, where: Path) -> Image.Image:
    """An image of any mode as upright 8-bit RGB.

    16-bit grey loses its low byte; alpha is dropped, the colours stay as stored. Raises FrameError for
    floating-point pixels, which have no range of their own.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        hint = "convert it to 8 or 16 bits: only you know which value is white"
        raise FrameError("the image has floating-point pixels", where=where, hint=hint)
    if image.mode.startswith("I"):
        deep = np.clip(np.asarray(image, dtype=np.int64), 0, 0xFFFF)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_rgb(path: Path) -> Image.Image:
    """Decode an image (see to_rgb). Raises FrameError where it is missing, no image, or truncated."""
    try:
        with Image.open(path) as opened:
            return to_rgb(opened, path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_rgb(path: Path, expected_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Read an image (h, w, 3). Raises FrameError where it is unreadable or of another size."""
    image = open_rgb(path)
    if (image.height, image.width) != expected_hw:
        raise _other_size(path, expected_hw, (image.height, image.width))
    return np.array(image)


def common_size(paths: list[Path]) -> tuple[int, int]:
    """(height, width) of upright images, from their headers. Raises FrameError where one differs from the first."""
    sizes = [_size(path) for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise _other_size(path, sizes[0], size)
    return sizes[0]


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as opened:
            sideways = opened.getexif().get(_ORIENTATION, 1) >= 5
            return (opened.width, opened.height) if sideways else (opened.height, opened.width)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FrameError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return FrameError(
        f"not a readable image: {reason}", where=path, hint="fetch it again, or take it out; then the same command"
    )


def _other_size(path: Path, expected: tuple[int, int], got: tuple[int, int]) -> FrameError:
    return FrameError(
        "an image of another size than the first",
        where=path,
        expected=f"{expected[1]}x{expected[0]}",
        got=f"{got[1]}x{got[0]}",
        hint="all frames of a video have one size: scale the images, or predict on them one by one",
    )


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, numbers in names counted as numbers. Raises FrameError where there are none."""
    found = [path for path in folder.iterdir() if is_image(path) and not path.name.startswith(".")]
    if not found:
        listed = ", ".join(IMAGE_SUFFIXES)
        several = f"a folder is one video; several go into a list: `ls -d {folder}/* > videos.txt`, then videos.txt"
        raise FrameError(
            "no images in this folder",
            where=folder,
            expected=f"files that end in {listed}",
            hint=several if any(folder.iterdir()) else None,
        )
    return sorted(found, key=lambda path: _natural(path.name))


def listed_in(file: Path) -> list[Path]:
    """The paths of a list, one a line, relative to its folder. Raises FrameError for an empty or binary list."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise FrameError("not a list of paths: no UTF-8 text", where=file) from error
    paths = [file.parent / line for line in lines if line]
    if not paths:
        raise FrameError("the list is empty", where=file, expected="one path a line")
    return paths


def is_image(path: Path) -> bool:
    """Whether a name is an image's."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts frame10 behind frame9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
