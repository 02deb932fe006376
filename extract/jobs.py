"""What a config asks stage one for: every group of every cache, with the frames that go into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import AnnotationError
from cache.labels.tracks import Video
from cache.layout import Size, VideoAttributes, View, video_group_name
from cache.media.geometry import network_size, transform_of
from configs.schema import Settings
from configs.splits import SplitPaths, all_splits, pseudo_split
from configs.views import train_views
from extract.detector.frozen import PADDING_DIVISOR
from extract.frames import FrameFile, require_files
from extract.pseudo import PseudoVideo, draw_pseudo_videos, labels_json


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """One group of a cache: a video, a view of one, or a pseudo-video."""

    name: str
    attributes: VideoAttributes
    files: tuple[FrameFile, ...]


@dataclass(frozen=True, kw_only=True)
class SplitJobs:
    """All groups of one cache, and the labels that it carries."""

    split: SplitPaths
    labels_json: bytes
    jobs: tuple[VideoJob, ...]
    short_edge: int | None
    """Of the fingerprint: None where frames have a size of their own."""


def open_jobs(settings: Settings, only: Sequence[str] = ()) -> list[SplitJobs]:
    """Read the labels of every split of a config (or of those in `only`) and check that the frames are there.

    Raises AnnotationError for unreadable labels, FrameError for missing frames.
    """
    jobs = [_of_videos(settings, split) for split in all_splits(settings) if not only or split.name in only]
    pseudo = pseudo_split(settings)
    if pseudo is not None and (not only or pseudo.name in only):
        jobs.append(_of_stills(settings, pseudo))
    return jobs


def _of_videos(settings: Settings, split: SplitPaths) -> SplitJobs:
    labels = split.read_labels()
    if not labels.videos:
        raise AnnotationError("the label file has no videos", where=split.labels)
    names = () if settings.extract.skip_errors else (name for video in labels.videos for name in video.file_names)
    require_files(names, split.frames)
    jobs = tuple(
        video_job(video, view, split.frames, settings.detector.short_edge)
        for video in labels.videos
        for view in (train_views(settings, video) if split.name == "train" else (View(),))
    )
    return SplitJobs(
        split=split, labels_json=split.labels.read_bytes(), jobs=jobs, short_edge=settings.detector.short_edge
    )


def video_job(video: Video, view: View, frames: Path, short_edge: int | None) -> VideoJob:
    """A view of a video."""
    frame_hw = (video.height, video.width)
    attributes = attributes_of(video.length, frame_hw, short_edge, view)
    name, transform = video_group_name(video.id, view), transform_of(attributes)
    files = tuple(
        FrameFile(group=name, path=frames / file, original_hw=frame_hw, transform=transform)
        for file in video.file_names
    )
    return VideoJob(name=name, attributes=attributes, files=files)


def attributes_of(num_frames: int, frame_hw: Size, short_edge: int | None, view: View | None = None) -> VideoAttributes:
    """Sizes of a video as the detector will see it; `short_edge` of the network input where the view names none."""
    view = view or View()
    original_hw = frame_hw if view.crop is None else view.crop[2:]
    image_hw = network_size(original_hw, view.short_edge or short_edge)
    return VideoAttributes(
        num_frames=num_frames,
        image_hw=image_hw,
        padded_hw=(padded(image_hw[0]), padded(image_hw[1])),
        original_hw=original_hw,
        view=view,
    )


def _of_stills(settings: Settings, split: SplitPaths) -> SplitJobs:
    categories = all_splits(settings)[0].read_labels().categories
    videos = draw_pseudo_videos(settings.pseudo, split.labels, categories)
    require_files(() if settings.extract.skip_errors else (video.still.file_name for video in videos), split.frames)
    return SplitJobs(
        split=split,
        labels_json=labels_json(videos, categories),
        jobs=tuple(_pseudo_job(video, split.frames) for video in videos),
        short_edge=None,
    )


def _pseudo_job(pseudo: PseudoVideo, images: Path) -> VideoJob:
    """The transformed images are what the labels call the video's frames, so there is no view."""
    still, size = pseudo.still, pseudo.transforms[0].size
    name = video_group_name(still.id)
    files = tuple(
        FrameFile(
            group=name, path=images / still.file_name, original_hw=(still.height, still.width), transform=transform
        )
        for transform in pseudo.transforms
    )
    return VideoJob(name=name, attributes=attributes_of(len(files), size, None), files=files)


def padded(edge: int) -> int:
    """An edge of the network input with its padding, in pixels."""
    return -(-edge // PADDING_DIVISOR) * PADDING_DIVISOR
