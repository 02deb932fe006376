"""The videos of a report: frames once, every side's masks as see-through pictures over them, within a budget.

A page of base64 stays below 15 MB: frames are scaled down to MAX_EDGE and, where that is not enough, thinned evenly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cache.labels.tracks import Video
from evaluate.metrics.video_iou import TrackMasks, track_ious
from evaluate.pictures.overlays import (
    PALETTE,
    DrawnTrack,
    css_colour,
    evenly,
    jpeg_data_url,
    overlay_data_url,
    read_image,
)

MAX_EDGE = 640  # pixels of a picture's longer edge
MOST_FRAMES = 48  # of a video
BUDGET = 12_000_000  # characters of all pictures together
SAME_OBJECT = 0.5  # IoU from which on a track takes a labelled object's colour


@dataclass(frozen=True, kw_only=True)
class ScrubbedSide:
    """What one side sees in a video. `visible`: for each frame the tracks in it, as positions in `legend`."""

    title: str
    legend: tuple[tuple[str, str], ...]  # caption, colour
    overlays: tuple[str, ...]
    visible: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ScrubbedVideo:
    """A video: numbers of its frames (from 0), their pictures as data URLs, and all sides' masks over them."""

    name: str
    length: int
    hw: tuple[int, int]
    frames: tuple[int, ...]
    pictures: tuple[str, ...]
    sides: tuple[ScrubbedSide, ...]

    @property
    def size(self) -> int:
        """Characters of its pictures."""
        return sum(map(len, self.pictures)) + sum(len(url) for side in self.sides for url in side.overlays)

    def thinned(self, count: int) -> ScrubbedVideo:
        """Keep `count` frames, evenly spaced."""
        kept = evenly(len(self.frames), count)
        sides = (
            replace(
                side,
                overlays=tuple(side.overlays[index] for index in kept),
                visible=tuple(side.visible[index] for index in kept),
            )
            for side in self.sides
        )
        return replace(
            self,
            frames=tuple(self.frames[index] for index in kept),
            pictures=tuple(self.pictures[index] for index in kept),
            sides=tuple(sides),
        )


def within_budget(videos: Sequence[ScrubbedVideo], budget: int = BUDGET) -> list[ScrubbedVideo]:
    """Thin all videos alike until their pictures fit; one frame of each stays in any case."""
    kept = list(videos)
    while (size := sum(video.size for video in kept)) > budget and any(len(video.frames) > 1 for video in kept):
        kept = [video.thinned(max(1, int(len(video.frames) * min(0.95, budget / size)))) for video in kept]
    return kept


def scrub_video(video: Video, folder: Path, sides: Mapping[str, Sequence[DrawnTrack]]) -> ScrubbedVideo:
    """Read and draw a video; the first side's tracks lend their colours to those that overlap them.

    Raises FrameError where the data set's frames are missing.
    """
    frames = evenly(video.length, MOST_FRAMES)
    scale = min(1.0, MAX_EDGE / max(video.height, video.width))
    hw = (max(1, round(video.height * scale)), max(1, round(video.width * scale)))
    pictures = []
    for frame in frames:
        scaled = Image.fromarray(read_image(folder, video, frame)).resize(hw[::-1], Image.Resampling.LANCZOS)
        pictures.append(jpeg_data_url(np.asarray(scaled)))
    reference = next(iter(sides.values()))
    return ScrubbedVideo(
        name=video.name,
        length=video.length,
        hw=hw,
        frames=tuple(frames),
        pictures=tuple(pictures),
        sides=tuple(_side(title, tracks, reference, video, frames, hw) for title, tracks in sides.items()),
    )


def _side(
    title: str,
    tracks: Sequence[DrawnTrack],
    reference: Sequence[DrawnTrack],
    video: Video,
    frames: Sequence[int],
    hw: tuple[int, int],
) -> ScrubbedSide:
    colours = _colours(tracks, reference, video)
    return ScrubbedSide(
        title=title,
        legend=tuple((track.caption, css_colour(colour)) for track, colour in zip(tracks, colours, strict=True)),
        overlays=tuple(overlay_data_url(tracks, colours, frame, (video.height, video.width), hw) for frame in frames),
        visible=tuple(
            tuple(index for index, track in enumerate(tracks) if track.segmentations[frame] is not None)
            for frame in frames
        ),
    )


def _colours(tracks: Sequence[DrawnTrack], reference: Sequence[DrawnTrack], video: Video) -> list[int]:
    """A place in the palette for every track: that of the reference track it overlaps most, or else a free one."""
    own, others = ([TrackMasks.of(t.segmentations, video) for t in side] for side in (tracks, reference))
    ious = track_ious(own, others)
    colours: dict[int, int] = {}
    for index in np.argsort(-ious, axis=None, kind="stable").tolist():
        row, column = divmod(index, len(reference))
        if ious[row, column] >= SAME_OBJECT and row not in colours and column % len(PALETTE) not in colours.values():
            colours[row] = column % len(PALETTE)
    free = itertools.cycle([c for c in range(len(PALETTE)) if c not in colours.values()] or range(len(PALETTE)))
    return [colours[row] if row in colours else next(free) for row in range(len(tracks))]
