"""Footage: a video file or a row of images that belongs to no data set, looked through once and read as a stream.

A cache of footage carries its record (`footage.json`): whoever draws on the frames finds the very same again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.errors import CacheError, CorruptData, FrameError
from cache.fingerprint import sha256_file
from cache.labels.masks import MAX_PIXELS
from cache.layout import write_file_atomically
from cache.media.image_files import common_size, images_in, is_image, listed_in, read_rgb
from cache.media.video_files import Decoding
from cache.storage.stores import open_store

RECORD = "footage.json"
IMAGE_RATE = 10.0
"""Frames a second of images, which carry no time."""


@dataclass(frozen=True, kw_only=True)
class Footage:
    """What is known of one piece of footage after looking through it."""

    source: str
    """Absolute path of the video file, the folder or the list."""
    images: tuple[str, ...]
    """Absolute paths of the images that are frames; none of a video file."""
    sha256: str
    """Of the video file, or of all images one after another."""
    stride: int
    """Every how many frames one is taken."""
    height: int
    width: int
    seconds: tuple[float, ...]
    """When each frame taken is shown, counted from the first."""
    problem: str | None
    """What of the file could not be used."""

    @property
    def name(self) -> str:
        """A short name, not always unique."""
        return Path(self.source).stem

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Decode the frames taken, upright RGB (h, w, 3), one after another.

        Raises FrameError where the source is no longer what it was.
        """
        hw, images = (self.height, self.width), tuple(map(Path, self.images))
        if _digest(Path(self.source), images) != self.sha256:
            raise self._changed()
        if images:
            yield from (read_rgb(image, hw) for image in images)
            return
        count = 0
        decoded = islice(Decoding(Path(self.source)).frames(), 0, None, self.stride)
        for frame in islice(decoded, len(self.seconds)):
            if frame.hw != hw:
                break
            yield frame.rgb()
            count += 1
        if count < len(self.seconds):
            raise self._changed(f"{len(self.seconds)} frames of {self.width}x{self.height}", str(count))

    def _changed(self, expected: str | None = None, got: str | None = None) -> FrameError:
        what = "the pictures have changed since they were looked through"
        hint = "put the old files back, or extract the new ones: the cache holds the features of the old ones"
        return FrameError(what, where=self.source, expected=expected, got=got, hint=hint)


def _digest(source: Path, images: Sequence[Path]) -> str:
    """SHA-256 (hex) of a video file, or of all images one after another. Raises FrameError where one is missing."""
    try:
        if not images:
            return sha256_file(source)
        return hashlib.sha256("".join(sha256_file(image) for image in images).encode()).hexdigest()
    except OSError as error:
        raise FrameError(f"not readable: {error.strerror}", where=error.filename) from error


def look_through(path: Path, stride: int = 1) -> list[Footage]:
    """Find the footage at a path: a video file, a folder of images, or a text file with one path a line.

    A list of images is one video, any other list is as many as it names. Raises FrameError where there is nothing
    to decode, images differ in size, or a list names a list (which might be itself).
    """
    path = path.absolute()
    if not path.exists():
        raise FrameError("no such file or folder", where=path)
    if path.is_dir():
        return [_of_images(path, images_in(path), stride)]
    if path.suffix.lower() == ".txt":
        listed = listed_in(path)
        if all(is_image(entry) for entry in listed):
            return [_of_images(path, listed, stride)]
        if lists := [entry for entry in listed if entry.suffix.lower() == ".txt"]:
            raise FrameError("a list within a list", where=path, got=lists[0], hint="name its paths here instead")
        return [footage for entry in listed for footage in look_through(entry, stride)]
    if is_image(path):
        return [_of_images(path, [path], stride)]
    return [_of_video(path, stride)]


def _of_images(source: Path, images: Sequence[Path], stride: int) -> Footage:
    taken = [image.absolute() for image in images[::stride]]
    height, width = common_size(taken)
    return _checked(
        Footage(
            source=str(source),
            images=tuple(map(str, taken)),
            sha256=_digest(source, taken),
            stride=stride,
            height=height,
            width=width,
            seconds=tuple(index * stride / IMAGE_RATE for index in range(len(taken))),
            problem=None,
        )
    )


def _of_video(source: Path, stride: int) -> Footage:
    decoding, seconds, hw = Decoding(source), [], (0, 0)
    for frame in decoding.frames():
        seconds.append(frame.seconds)
        hw = frame.hw
    problems = decoding.problems
    if not seconds:
        raise FrameError("not a single frame can be decoded", where=source, got=problems[0] if problems else None)
    if len(problems) > 3:
        problems = [*problems[:2], f"and so on at {len(problems) - 3} more places", problems[-1]]
    return _checked(
        Footage(
            source=str(source),
            images=(),
            sha256=_digest(source, ()),
            stride=stride,
            height=hw[0],
            width=hw[1],
            seconds=tuple(moment - seconds[0] for moment in seconds[::stride]),
            problem="; ".join(problems) or None,
        )
    )


def _checked(footage: Footage) -> Footage:
    if footage.height * footage.width > MAX_PIXELS:
        size = f"{footage.width}x{footage.height}"
        raise FrameError("the frames are too large", where=footage.source, expected=f"{MAX_PIXELS} pixels", got=size)
    return footage


def write_record(features: Path, footage: Sequence[Footage]) -> None:
    """Put down in a cache what its videos 1, 2, ... are."""
    write_file_atomically(features / RECORD, json.dumps([asdict(piece) for piece in footage]).encode())


def read_record(features: Path) -> list[Footage]:
    """What a cache's videos 1, 2, ... are. Raises CacheError where it is a cache of something else."""
    content = open_store(features).read_file(RECORD)
    if content is None:
        hint = "`python -m extract video CONFIG FILE cache.path=...` writes one"
        raise CacheError("not a cache of videos of your own", where=features, hint=hint)
    try:
        stored = json.loads(content)
        return [Footage(**{**piece, "images": tuple(piece["images"]), "seconds": tuple(piece["seconds"])})
                for piece in stored]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"unreadable record of footage: {error!r}", where=features / RECORD) from error
