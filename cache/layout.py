"""Names, constants and per-video attributes of cache format 1; cache/FORMAT.md is the specification.

Shape legend: T frames, L detector layers, Q frame queries, C channels, R stored channels, H x W the stride-4
map.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CacheError, CorruptData

FORMAT_NAME = "vita-cache"
FORMAT_VERSION = 1
METADATA = "zarr.json"
DETECTOR, CODEC, VIDEOS, ANNOTATIONS = "detector", "codec", "videos", "annotations.json"
CARD = "README.md"  # for people; no reader looks at it
EXTRACTION_RECORD = "extraction.json"  # what extracting has cost
SKIPPED = "skipped.json"  # videos that could not be read, and why
FRAME_QUERIES, MASK_FEATURES = "frame_queries", "mask_features"
CHECKSUMS = "content_crc32c"  # attribute of a video: what all elements of each field add up to
AXES = {FRAME_QUERIES: ("T", "L", "Q", "C"), MASK_FEATURES: ("T", "R", "H", "W")}
FRAMES_PER_SHARD = 64
STRIDE = 4

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A declared variant of a video; the default is the video itself.

    The transform happens in the order of the fields. The name is derived from the transform, so two different
    transforms can never share the name of a group in the cache.
    """

    crop: tuple[int, int, int, int] | None = None
    """(top, left, height, width) in pixels of the original frame."""
    short_edge: int | None = None
    """Pixels; None: the short edge of the fingerprint's preprocessing."""
    flip: bool = False
    """Mirrored left to right."""

    @property
    def kind(self) -> str:
        """The name without the place of the crop, which is each video's own."""
        return self.name.replace("x".join(map(str, self.crop)), "") if self.crop else self.name

    @property
    def name(self) -> str:
        """The suffix of the group name, "" for the video itself, such as `crop0x16x360x600-edge320-flip`."""
        parts = [] if self.crop is None else ["crop" + "x".join(str(number) for number in self.crop)]
        parts += [] if self.short_edge is None else [f"edge{self.short_edge}"]
        return "-".join([*parts, *(["flip"] if self.flip else [])])


@dataclass(frozen=True, kw_only=True)
class VideoAttributes:
    """What the cache knows of one video beside its arrays. All sizes are (height, width) in pixels."""

    num_frames: int
    image_hw: Size
    """The network input without padding."""
    padded_hw: Size
    """The network input with its zero padding at the bottom and on the right."""
    original_hw: Size
    """The frames as they lie on disk (after the view's crop)."""
    view: View = field(default_factory=View)

    def __post_init__(self) -> None:
        numbers = (self.num_frames, *self.image_hw, *self.padded_hw, *self.original_hw)
        if min(numbers) < 1:
            raise CacheError("number of frames and sizes must be positive", got=numbers)
        if self.padded_hw[0] < self.image_hw[0] or self.padded_hw[1] < self.image_hw[1]:
            raise CacheError("the padded size is smaller than the image", got=(self.image_hw, self.padded_hw))

    @property
    def map_hw(self) -> Size:
        """(H, W) of the stored mask features."""
        return cropped_map_hw(_map_hw(self.padded_hw), self.image_hw)

    @property
    def padded_map_hw(self) -> Size:
        """(H, W) of the detector's map, before cropping."""
        return _map_hw(self.padded_hw)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the group's attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], *, where: object) -> VideoAttributes:
        """Read the group's attributes. Raises CorruptData where a key is missing or impossible."""
        try:
            view = stored["view"]
            crop = None if view["crop"] is None else tuple(view["crop"])
            return cls(
                num_frames=stored["num_frames"],
                image_hw=_size(stored["image_hw"]),
                padded_hw=_size(stored["padded_hw"]),
                original_hw=_size(stored["original_hw"]),
                view=View(crop=crop, short_edge=view["short_edge"], flip=view["flip"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptData(f"unreadable video attributes: {error!r}", where=where) from error


def _size(stored: Any) -> Size:
    height, width = stored
    return int(height), int(width)


def _map_hw(hw: Size) -> Size:
    return -(-hw[0] // STRIDE), -(-hw[1] // STRIDE)


def cropped_map_hw(map_hw: Size, image_hw: Size) -> Size:
    """(H, W) of what crop_map keeps of a map of size `map_hw`."""
    height, width = (min(-(-image_hw[i] // STRIDE) + 1, map_hw[i]) for i in (0, 1))
    return height, width


def crop_map(mask_features: NDArray[np.floating[Any]], image_hw: Size) -> NDArray[np.floating[Any]]:
    """Cut the padding of a map (..., H, W): keep the image rounded up, plus one row and column of padding.

    The additional row and column are what bilinear up-sampling reads at the image's last pixels, so that the
    up-sampled image area equals that of the whole padded map exactly.
    """
    height, width = cropped_map_hw((mask_features.shape[-2], mask_features.shape[-1]), image_hw)
    return mask_features[..., :height, :width]


def video_group_name(video_id: int | str, view: View | None = None) -> str:
    """Name of a video's group: the id, and `@view` where the view is not the video itself.

    Raises CacheError for ids that are no safe folder name.
    """
    name = str(video_id)
    if "@" in name:
        raise CacheError("a video id may not contain '@', which separates the view", where=f"video {name!r}")
    return checked_name(f"{name}@{view.name}" if view is not None and view.name else name)


def checked_name(name: str) -> str:
    """The name, if it is one plain folder name. Raises CacheError for separators, `..` and leading dots."""
    forbidden = any(character in "/\\" or ord(character) < 32 for character in name)
    if not name or forbidden or name.startswith((".", "@", "__")) or ".." in name or name == METADATA:
        raise CacheError("unsafe video name", where=f"video {name!r}", expected="one plain folder name")
    if len(name.encode()) > 200:
        raise CacheError("video name too long", where=f"video {name[:40]!r}...", expected="at most 200 bytes")
    return name


def is_video_name(name: str) -> bool:
    """Whether a group may be a video: what other tools left beside the videos is none."""
    try:
        return checked_name(name) == name
    except CacheError:
        return False


def shard_ranges(num_frames: int) -> Iterator[range]:
    """The frames of a video, shard by shard."""
    for start in range(0, num_frames, FRAMES_PER_SHARD):
        yield range(start, min(start + FRAMES_PER_SHARD, num_frames))


def fill_value(dtype: np.dtype[Any]) -> float | int:
    """The value a Zarr reader shows where nothing is stored: one that no whole frame of data can consist of.

    NaN for floats, the lowest value for signed integers, the highest for unsigned ones.
    """
    if dtype.kind == "f":
        return float("nan")
    return int(np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max)


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a Zarr v3 group with these attributes."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def read_metadata(folder: Path | str) -> bytes:
    """The zarr.json in `folder`. Raises OSError."""
    # A cache of thousands of videos has three each: no pathlib, no buffer.
    with FileIO(f"{folder}/{METADATA}") as file:
        return file.readall()


def read_group_attributes(folder: Path | str) -> dict[str, Any] | None:
    """The attributes of the Zarr group in `folder`, None where there is no group.

    Raises CorruptData where its zarr.json is not a group's.
    """
    try:
        content = read_metadata(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_group_attributes(content, f"{folder}/{METADATA}")


def parse_group_attributes(content: bytes, where: str) -> dict[str, Any]:
    """The attributes in a group's zarr.json. Raises CorruptData where it is not a group's."""
    try:
        attributes = json.loads(content.decode())["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(f"unreadable group metadata: {error!r}", where=where) from error
    if not isinstance(attributes, dict):
        raise CorruptData("group attributes are not a mapping", where=where)
    return attributes


def write_file_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step that survives a crash: readers see the old content or all of the new.

    The caller holds the folder's lock: two writers of one file would share the temporary file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
