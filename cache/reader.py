"""Opening a cache and reading its videos. Nothing is held open, so all objects travel between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cache.codecs import Codec, codec_class, select_codec
from cache.codecs.blocks import block_grid
from cache.errors import CacheError, CorruptData, FormatVersionError, IncompleteVideo, VitaCacheError
from cache.fingerprint import Fingerprint
from cache.heads import DetectorHeads
from cache.labels.annotations import parse_labels
from cache.labels.json_entries import parse_json
from cache.labels.tracks import Labels
from cache.layout import (
    ANNOTATIONS,
    CHECKSUMS,
    CODEC,
    DETECTOR,
    FORMAT_NAME,
    FORMAT_VERSION,
    FRAME_QUERIES,
    MASK_FEATURES,
    METADATA,
    SKIPPED,
    VIDEOS,
    Size,
    VideoAttributes,
    checked_name,
    parse_group_attributes,
)
from cache.storage.contract import Store
from cache.storage.frames import FrameArray, HeldFrames
from cache.storage.stores import open_store

RESUME_HINT = "run `make extract` with the same settings: it continues and extracts only what is missing"

_RESTORE_HINT = "restore it from a copy of the cache, or extract into another cache.path"


@dataclass(frozen=True, kw_only=True)
class Root:
    """The attributes of a cache's root group."""

    fingerprint: Fingerprint
    codec_name: str
    codec_parameters: dict[str, Any]
    sessions: tuple[dict[str, Any], ...]
    """Provenance, one mapping for each writing session."""

    @property
    def block(self) -> int:
        """Pixels of the map that a stored position stands for, in each direction. Raises CacheError: no such codec."""
        return codec_class(self.codec_name).block

    @classmethod
    def read(cls, store: Store) -> Root:
        """Read and check. Raises CacheError for no cache, FormatVersionError for another format version."""
        path, attributes = store.path, store.attributes("")
        if attributes is None or attributes.get("format") != FORMAT_NAME:
            caches = [str(file.parent) for file in sorted(path.glob(f"*/{METADATA}")) if _is_root(file)]
            hint = f"did you mean {' or '.join(caches)}?" if caches else "`make extract` writes one"
            raise CacheError("no feature cache here", where=path, hint=hint)
        if attributes.get("format_version") != FORMAT_VERSION:
            raise FormatVersionError(
                "the cache has another format version",
                where=path,
                expected=FORMAT_VERSION,
                got=attributes.get("format_version"),
                hint=_version_hint(attributes.get("format_version"), path),
            )
        try:
            root = cls(
                fingerprint=Fingerprint.from_json(attributes["fingerprint"], where=path),
                codec_name=attributes["codec"]["name"],
                codec_parameters=attributes["codec"]["parameters"],
                sessions=tuple(attributes["provenance"]),
            )
        except (KeyError, TypeError) as error:
            raise CorruptData(f"unreadable root attributes: {error!r}", where=path) from error
        mappings = (root.codec_parameters, *root.sessions)
        if not isinstance(root.codec_name, str) or not all(isinstance(each, dict) for each in mappings):
            raise CorruptData("unreadable root attributes: codec or provenance of another type", where=path)
        return root


def _is_root(file: Path) -> bool:
    """Whether a zarr.json is that of a cache's root."""
    try:
        return parse_group_attributes(file.read_bytes(), str(file)).get("format") == FORMAT_NAME
    except (OSError, CorruptData):
        return False


def _version_hint(found: object, path: Path) -> str:
    """The command that makes a cache of another version readable. Every version to come reads format 1."""
    again = "`make extract CONFIG=... cache.path=<a new path>` extracts again"
    if isinstance(found, int) and found > FORMAT_VERSION:
        update = f"`git pull && make install`, then `python -m cache upgrade {path}`"
        return f"a later release wrote it: update vita-cache ({update}); or {again}"
    return f"no release wrote this version; {again}"


@dataclass(frozen=True, kw_only=True)
class ClipArrays:
    """Everything stored of some frames."""

    frame_queries: NDArray[Any]
    """(len(frames), L, Q, C) float16, pre-norm."""
    mask_features: NDArray[Any]
    """(len(frames), R, h, w) in the codec's dtype; h x w is `CachedVideo.stored_hw`."""


@dataclass(frozen=True, kw_only=True)
class CachedVideo:
    """A complete video of a cache."""

    name: str
    store: Store
    attributes: VideoAttributes
    source: str | None
    """Digest of the frames' names and size in the label file (fingerprint.source_digest); None: no labels."""
    checksums: Any = None
    """The attribute `content_crc32c`, as it is stored; None in caches of earlier versions."""
    block: int = 1
    """Pixels of the map that a stored position stands for, in each direction."""
    preload: bool = False

    @property
    def stored_hw(self) -> Size:
        """(h, w) of what is stored of a map."""
        return block_grid(self.attributes.map_hw, self.block)

    def frame_queries(self, frames: Sequence[int] | None = None) -> NDArray[Any]:
        """Pre-norm queries (len(frames), L, Q, C) float16 in the order asked for; None: all frames.

        The array is the caller's own. Raises CorruptData for missing or damaged bytes and IndexError for
        frames outside [0, T).
        """
        return self.queries.read(self._chosen(frames))

    def mask_features(self, frames: Sequence[int] | None = None) -> NDArray[Any]:
        """Encoded mask features (len(frames), R, h, w) in the codec's dtype; else as frame_queries."""
        return self.maps.read(self._chosen(frames))

    def read_clip(self, frames: Sequence[int], out: ClipArrays | None = None) -> ClipArrays:
        """All fields of some frames, into `out` if given: buffers of one's own are read into without a copy.

        The arrays of `out` must be C-contiguous and of the fields' dtypes and shapes (len(frames), ...). Raises
        as frame_queries does; `out` then holds anything.
        """
        return ClipArrays(
            frame_queries=self.queries.read(frames, None if out is None else out.frame_queries),
            mask_features=self.maps.read(frames, None if out is None else out.mask_features),
        )

    def _chosen(self, frames: Sequence[int] | None) -> Sequence[int]:
        return range(self.attributes.num_frames) if frames is None else frames

    @cached_property
    def queries(self) -> FrameArray:
        """The queries (T, L, Q, C), unread."""
        return self._open(FRAME_QUERIES, ())

    @cached_property
    def maps(self) -> FrameArray:
        """The encoded mask features (T, R, h, w), unread."""
        return self._open(MASK_FEATURES, self.stored_hw)

    def _open(self, field: str, last_axes: tuple[int, ...]) -> FrameArray:
        array = self.store.frames(self.name, field)
        fits = len(array.shape) == 4 and array.shape[4 - len(last_axes) :] == last_axes
        if not fits or array.shape[0] != self.attributes.num_frames:
            expected = f"{self.attributes.num_frames} frames, 4 axes, the last {last_axes}"
            where = f"{self.store.path}: video {self.name!r}, {field}"
            raise CorruptData("array does not fit the video", where=where, expected=expected, got=array.shape)
        return HeldFrames(array) if self.preload else array


class FeatureCache:
    """A cache opened for reading. Picklable; arrays are opened by the process that first reads them."""

    def __init__(self, store: Store, root: Root, *, preload: bool) -> None:
        self.store, self.root, self.preload = store, root, preload
        self._videos: dict[str, CachedVideo] = {}

    @classmethod
    def open(cls, path: Path | str, *, preload: bool = False) -> FeatureCache:
        """Open the cache at `path`: a folder, an HDF5 file or a remote address (see cache.storage.stores.open_store).

        With `preload` every video stays in memory once it has been read. Raises CacheError where there is no
        cache, FormatVersionError for another version of the format.
        """
        store = open_store(path)
        return cls(store, Root.read(store), preload=preload)

    @property
    def path(self) -> Path:
        """Where the cache lies, for messages."""
        return self.store.path

    def __getstate__(self) -> dict[str, Any]:
        """Without the videos read so far, which every process keeps for itself."""
        return {**self.__dict__, "_videos": {}}

    @property
    def fingerprint(self) -> Fingerprint:
        """What the features depend on."""
        return self.root.fingerprint

    @cached_property
    def codec(self) -> Codec:
        """The codec of the mask features, with its fitted arrays. Raises CacheError for those of no codec."""
        arrays = self.store.arrays(CODEC)
        try:
            return select_codec(self.root.codec_name, self.root.codec_parameters, arrays)
        except CacheError as error:
            raise type(error)(str(error), where=self.path / CODEC, hint=_RESTORE_HINT) from error

    @cached_property
    def heads(self) -> DetectorHeads:
        """The detector's frozen prediction heads. Raises CorruptData, WeightsError where they are damaged."""
        attributes = self.store.attributes(DETECTOR) or {}
        names = attributes.get("category_names", [])
        if not isinstance(names, list):
            raise CorruptData("unreadable category names", where=self.path / DETECTOR, expected="a list", got=names)
        arrays = self.store.arrays(DETECTOR)
        try:
            return DetectorHeads(arrays=arrays, category_names=tuple(names))
        except VitaCacheError as error:
            raise type(error)(str(error), where=self.path / DETECTOR, hint=_RESTORE_HINT) from error

    def labels_json(self) -> bytes:
        """The data set's label file, byte for byte. Raises CacheError where the cache has none."""
        content = self.store.read_file(ANNOTATIONS)
        if content is None:
            where = self.path / ANNOTATIONS
            raise CacheError("the cache has no labels", where=where, hint="run `make extract` with a label file")
        return content

    def labels(self) -> Labels:
        """The labels that the cache carries. Raises CacheError where there are none, AnnotationError if broken."""
        where = str(self.path / ANNOTATIONS)
        return parse_labels(parse_json(self.labels_json(), where), where)

    def video_names(self) -> list[str]:
        """Names of the complete videos (`<video id>[@<view>]`), sorted."""
        return [name for name, attributes in self.store.videos() if attributes]

    def skipped(self) -> dict[str, str]:
        """Names of the videos that extraction left out, and why; those that it could read later are not among them.

        Raises AnnotationError, CorruptData where the record is damaged.
        """
        where = self.path / SKIPPED
        content = self.store.read_file(SKIPPED)
        reasons = {} if content is None else parse_json(content, str(where))
        if not isinstance(reasons, dict):
            raise CorruptData("unreadable record of skipped videos", where=where, expected="names and reasons")
        complete = set(self.video_names()) if reasons else set()
        return {name: str(reason) for name, reason in reasons.items() if name not in complete}

    def incomplete(self) -> list[str]:
        """Names of videos whose extraction has begun but not finished, sorted."""
        return [name for name, attributes in self.store.videos() if not attributes]

    def video(self, name: str) -> CachedVideo:
        """Raises IncompleteVideo where the video is not there as a whole."""
        if name not in self._videos:
            self._videos[name] = self._read_video(name)
        return self._videos[name]

    def _read_video(self, name: str) -> CachedVideo:
        attributes = self.store.attributes(f"{VIDEOS}/{checked_name(name)}")
        where = f"{self.path}: video {name!r}"
        if attributes is None or attributes.get("complete") is not True:
            what = "video is not in the cache" if attributes is None else "the video's extraction did not finish"
            raise IncompleteVideo(what, where=where, hint=RESUME_HINT)
        return CachedVideo(
            name=name,
            store=self.store,
            attributes=VideoAttributes.from_json(attributes, where=where),
            source=attributes.get("source"),
            checksums=attributes.get(CHECKSUMS),
            block=self.root.block,
            preload=self.preload,
        )
