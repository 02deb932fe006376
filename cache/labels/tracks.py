"""The labels of a data set in memory: categories, videos and the objects' tracks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath

from cache.errors import AnnotationError, some
from cache.labels import masks
from cache.labels.masks import Rle

Occlusion = int | float | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Category:
    """An object category, with the id of the label file."""

    id: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video of `length` frames of (height, width) pixels; `file_names` are relative to the image folder."""

    id: int
    width: int
    height: int
    length: int
    file_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder of the frames, which names the video beyond this file's numbering."""
        folder = str(PurePosixPath(self.file_names[0]).parent)
        return folder if folder != "." else PurePosixPath(self.file_names[0]).stem


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One object through one video: a mask per frame, None where it is not seen.

    `areas` holds pixels per frame as the file gives them (computed where it does not), 0 where it is not
    seen. `occlusion` is OVIS's attribute per frame, as it stands in the file.
    """

    id: int
    video_id: int
    category_id: int
    iscrowd: bool
    segmentations: tuple[Rle | None, ...]
    areas: tuple[float, ...]
    occlusion: tuple[Occlusion, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A label file. `categories` are sorted by id; `has_tracks` is False for a split without labels."""

    categories: tuple[Category, ...]
    videos: tuple[Video, ...]
    tracks: tuple[Track, ...]
    has_tracks: bool

    @cached_property
    def category_index(self) -> Mapping[int, int]:
        """Category id -> contiguous class index 0 .. K-1, in ascending order of ids."""
        return {category.id: index for index, category in enumerate(self.categories)}

    @cached_property
    def video_by_id(self) -> Mapping[int, Video]:
        """Video id -> video."""
        return {video.id: video for video in self.videos}

    @cached_property
    def _tracks_by_video(self) -> Mapping[int, tuple[Track, ...]]:
        grouped: dict[int, list[Track]] = {video.id: [] for video in self.videos}
        for track in self.tracks:
            grouped[track.video_id].append(track)
        return {video_id: tuple(tracks) for video_id, tracks in grouped.items()}

    def tracks_of(self, video_id: int) -> tuple[Track, ...]:
        """The tracks of a video, in file order."""
        return self._tracks_by_video[video_id]

    def subset(self, video_ids: Iterable[int]) -> Labels:
        """These videos with their tracks, in file order; all categories stay."""
        chosen = set(video_ids)
        if unknown := sorted(chosen - self.video_by_id.keys()):
            raise AnnotationError(f"{len(unknown)} videos are not in the labels", got=f"ids {some(unknown)}")
        return replace(
            self,
            videos=tuple(video for video in self.videos if video.id in chosen),
            tracks=tuple(track for track in self.tracks if track.video_id in chosen),
        )

    def to_json(self) -> dict[str, object]:
        """The same labels in YTVIS JSON, all masks compressed."""
        return {
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
            "videos": [_video_to_json(video) for video in self.videos],
            "annotations": [_track_to_json(track) for track in self.tracks] if self.has_tracks else None,
        }


def mask_areas(segmentations: Sequence[Rle | None]) -> tuple[float, ...]:
    """Foreground pixels per frame, 0 where there is no mask."""
    present = iter(masks.areas([rle for rle in segmentations if rle is not None]).tolist())
    return tuple(0.0 if rle is None else float(next(present)) for rle in segmentations)


def _video_to_json(video: Video) -> dict[str, object]:
    return {
        "id": video.id,
        "width": video.width,
        "height": video.height,
        "length": video.length,
        "file_names": list(video.file_names),
    }


def _track_to_json(track: Track) -> dict[str, object]:
    fields: dict[str, object] = {
        "id": track.id,
        "video_id": track.video_id,
        "category_id": track.category_id,
        "iscrowd": int(track.iscrowd),
        "segmentations": [None if rle is None else rle.to_json() for rle in track.segmentations],
        "areas": [area or None for area in track.areas],
    }
    return fields if track.occlusion is None else {**fields, "occlusion": list(track.occlusion)}
