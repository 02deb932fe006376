"""Opening a cache and reading its videos. Nothing is held open, so all objects travel between processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cache.codecs import Codec, select_codec
from cache.errors import CacheError, CorruptData, FormatVersionError, IncompleteVideo
from cache.fingerprint import Fingerprint
from cache.frames import FrameArray, HeldFrames, open_frames
from cache.heads import DetectorHeads
from cache.layout import (
    ANNOTATIONS,
    CODEC,
    DETECTOR,
    FORMAT_NAME,
    FORMAT_VERSION,
    FRAME_QUERIES,
    MASK_FEATURES,
    VIDEOS,
    VideoAttributes,
    checked_name,
    is_complete,
    read_group_attributes,
)

RESUME_HINT = "run `make extract` with the same settings: it continues and extracts only what is missing"


@dataclass(frozen=True, kw_only=True)
class Root:
    """The attributes of a cache's root group."""

    fingerprint: Fingerprint
    codec_name: str
    codec_parameters: dict[str, Any]
    sessions: tuple[dict[str, Any], ...]
    """Provenance, one mapping for each writing session."""

    @classmethod
    def read(cls, path: Path) -> Root:
        """Read and check. Raises CacheError for no cache, FormatVersionError for another format version."""
        attributes = read_group_attributes(path)
        if attributes is None or attributes.get("format") != FORMAT_NAME:
            raise CacheError("no feature cache here", where=path, hint="`make extract` writes one")
        if attributes.get("format_version") != FORMAT_VERSION:
            raise FormatVersionError(
                "the cache has another format version",
                where=path,
                expected=FORMAT_VERSION,
                got=attributes.get("format_version"),
                hint="extract again into a new path with `make extract`, or use the release that wrote it",
            )
        try:
            return cls(
                fingerprint=Fingerprint.from_json(attributes["fingerprint"], where=path),
                codec_name=attributes["codec"]["name"],
                codec_parameters=attributes["codec"]["parameters"],
                sessions=tuple(attributes["provenance"]),
            )
        except (KeyError, TypeError) as error:
            raise CorruptData(f"unreadable root attributes: {error!r}", where=path) from error


@dataclass(frozen=True, kw_only=True)
class CachedVideo:
    """A complete video of a cache."""

    name: str
    folder: Path
    attributes: VideoAttributes
    source: str | None
    """Digest of the frames' names and size in the label file (fingerprint.source_digest); None: no labels."""
    preload: bool = False

    def frame_queries(self, frames: Sequence[int] | None = None) -> NDArray[Any]:
        """Pre-norm queries (len(frames), L, Q, C) float16 in the order asked for; None: all frames.

        The array is the caller's own. Raises CorruptData for missing or damaged bytes and IndexError for
        frames outside [0, T).
        """
        return self._queries.read(self._chosen(frames))

    def mask_features(self, frames: Sequence[int] | None = None) -> NDArray[Any]:
        """Encoded mask features (len(frames), R, H, W) in the codec's dtype; else as frame_queries."""
        return self._maps.read(self._chosen(frames))

    def _chosen(self, frames: Sequence[int] | None) -> Sequence[int]:
        return range(self.attributes.num_frames) if frames is None else frames

    @cached_property
    def _queries(self) -> FrameArray:
        return self._open(FRAME_QUERIES, ())

    @cached_property
    def _maps(self) -> FrameArray:
        return self._open(MASK_FEATURES, self.attributes.map_hw)

    def _open(self, field: str, last_axes: tuple[int, ...]) -> FrameArray:
        array = open_frames(self.folder / field)
        fits = len(array.shape) == 4 and array.shape[4 - len(last_axes) :] == last_axes
        if not fits or array.shape[0] != self.attributes.num_frames:
            expected = f"{self.attributes.num_frames} frames, 4 axes, the last {last_axes}"
            where = self.folder / field
            raise CorruptData("array does not fit the video", where=where, expected=expected, got=array.shape)
        return HeldFrames(array) if self.preload else array


class FeatureCache:
    """A cache opened for reading. Picklable; arrays are opened by the process that first reads them."""

    def __init__(self, path: Path, root: Root, *, preload: bool) -> None:
        self.path, self.root, self.preload = path, root, preload
        self._videos: dict[str, CachedVideo] = {}

    @classmethod
    def open(cls, path: Path | str, *, preload: bool = False) -> FeatureCache:
        """Open the cache at `path`; with `preload` every video stays in memory once it has been read.

        Raises CacheError where there is none, FormatVersionError for another version of the format.
        """
        return cls(Path(path), Root.read(Path(path)), preload=preload)

    def __getstate__(self) -> dict[str, Any]:
        """Without the videos read so far, which every process keeps for itself."""
        return {**self.__dict__, "_videos": {}}

    @property
    def fingerprint(self) -> Fingerprint:
        """What the features depend on."""
        return self.root.fingerprint

    @cached_property
    def codec(self) -> Codec:
        """The codec of the mask features, with its fitted arrays."""
        arrays = read_arrays(self.path / CODEC)
        return select_codec(self.root.codec_name, self.root.codec_parameters, arrays)

    @cached_property
    def heads(self) -> DetectorHeads:
        """The detector's frozen prediction heads. Raises CorruptData, WeightsError where they are damaged."""
        attributes = read_group_attributes(self.path / DETECTOR) or {}
        names = tuple(attributes.get("category_names", ()))
        return DetectorHeads(arrays=read_arrays(self.path / DETECTOR), category_names=names)

    @property
    def labels_path(self) -> Path:
        """The copy of the data set's label file. Raises CacheError where there is none."""
        path = self.path / ANNOTATIONS
        if not path.exists():
            raise CacheError("the cache has no labels", where=path, hint="run `make extract` with a label file")
        return path

    def video_names(self) -> list[str]:
        """Names of the complete videos (`<video id>[@<view>]`), sorted."""
        return [name for name, complete in self._groups() if complete]

    def incomplete(self) -> list[str]:
        """Names of videos whose extraction has begun but not finished, sorted."""
        return [name for name, complete in self._groups() if not complete]

    def video(self, name: str) -> CachedVideo:
        """Raises IncompleteVideo where the video is not there as a whole."""
        if name not in self._videos:
            self._videos[name] = self._read_video(name)
        return self._videos[name]

    def _read_video(self, name: str) -> CachedVideo:
        folder = self.path / VIDEOS / checked_name(name)
        attributes = read_group_attributes(folder)
        if attributes is None or attributes.get("complete") is not True:
            what = "video is not in the cache" if attributes is None else "the video's extraction did not finish"
            raise IncompleteVideo(what, where=f"{self.path}: video {name!r}", hint=RESUME_HINT)
        return CachedVideo(
            name=name,
            folder=folder,
            attributes=VideoAttributes.from_json(attributes, where=folder),
            source=attributes.get("source"),
            preload=self.preload,
        )

    def _groups(self) -> Iterator[tuple[str, bool]]:
        return video_groups(self.path)


def video_groups(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, complete) of every video folder of the cache at `path`, sorted by name."""
    folder = path / VIDEOS
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else ():
        yield name, is_complete(folder / name)


def read_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """All small arrays of a group, whole. Raises CorruptData for damaged or missing bytes."""
    arrays = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else ():
        try:
            array = np.asarray(zarr.open_array(str(folder / name), mode="r")[...])
        except (ValueError, OSError, LookupError) as error:
            raise CorruptData(f"unreadable: {error}", where=folder / name) from error
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CorruptData("missing or non-finite numbers", where=folder / name)
        arrays[name] = array
    return arrays
