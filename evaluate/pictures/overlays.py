"""Pictures of tracks: masks over frames, one colour per track through the whole video."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from cache.errors import FrameError
from cache.labels import masks
from cache.labels.masks import Rle
from cache.labels.tracks import Labels, Video
from cache.media.image_files import to_rgb
from evaluate.results import TrackPrediction

TRUTH = "ground truth"  # what the labels' tracks are called
MIN_SCORE = 0.3  # tracks below it are not drawn, and no false alarms worth a count
# Twelve colours that stay apart for most kinds of colour vision, none of them grey.
PALETTE = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DrawnTrack:
    """A track to draw: its caption and one mask or None per frame; its place in the list is its colour."""

    caption: str
    segmentations: Sequence[Rle | None]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Some frames of a video as one side sees them: who drew it, its tracks' captions with their colours, data URLs."""

    title: str
    legend: list[tuple[str, str]]
    pictures: list[str]


def draw_strip(
    title: str, tracks: Sequence[DrawnTrack], images: Sequence[NDArray[np.uint8]], frames: Sequence[int]
) -> Strip:
    """Draw tracks over the images of these frames of their video."""
    return Strip(
        title=title,
        legend=[(track.caption, css_colour(index)) for index, track in enumerate(tracks)],
        pictures=[jpeg_data_url(draw_frame(image, tracks, frame)) for image, frame in zip(images, frames, strict=True)],
    )


def css_colour(index: int) -> str:
    """A colour of PALETTE as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[index % len(PALETTE)])


def evenly(length: int, count: int) -> list[int]:
    """Numbers of at most `count` of `length` frames, evenly spread from the first to the last."""
    return [int(place) for place in np.linspace(0, length - 1, min(length, count))]


def labelled_tracks(labels: Labels, video_id: int) -> list[DrawnTrack]:
    """Return the ground truth of a video."""
    names = {category.id: category.name for category in labels.categories}
    return [
        DrawnTrack(caption=names[track.category_id], segmentations=track.segmentations)
        for track in labels.tracks_of(video_id)
    ]


def predicted_tracks(
    labels: Labels, predictions: Sequence[TrackPrediction], video_id: int, min_score: float
) -> list[DrawnTrack]:
    """Return a video's predictions of at least `min_score`, best first, at most as many as there are colours."""
    names = {category.id: category.name for category in labels.categories}
    found = [p for p in predictions if p.video_id == video_id and p.score >= min_score]
    found = sorted(found, key=lambda p: -p.score)[: len(PALETTE)]
    return [DrawnTrack(caption=f"{names[p.category_id]} {p.score:.2f}", segmentations=p.segmentations) for p in found]


def draw_frame(image: NDArray[np.uint8], tracks: Sequence[DrawnTrack], frame: int) -> NDArray[np.uint8]:
    """Lay the tracks' masks of one frame over its image (h, w, 3), the first track on top, edges opaque."""
    drawn = image.copy()
    for index, track in reversed(list(enumerate(tracks))):
        rle = track.segmentations[frame]
        if rle is not None:
            box, mask = _boxed(rle)
            colour = np.array(PALETTE[index % len(PALETTE)], dtype=np.uint8)
            half = ((image[box].astype(np.uint16) + colour) // 2).astype(np.uint8)
            np.copyto(drawn[box], half, where=mask[..., None])
            np.copyto(drawn[box], colour, where=_edge(mask)[..., None])
    return drawn


def overlay_data_url(
    tracks: Sequence[DrawnTrack], colours: Sequence[int], frame: int, hw: tuple[int, int], shown_hw: tuple[int, int]
) -> str:
    """The masks alone, of one frame of size `hw`, as a see-through PNG of size `shown_hw`, the first track on top.

    `colours`: each track's place in PALETTE. Looks as `draw_frame` does once it lies over the frame.
    """
    indices = np.zeros(hw, dtype=np.uint8)  # 0 is clear, then two for each colour: inside, edge
    for track, colour in reversed(list(zip(tracks, colours, strict=True))):
        rle = track.segmentations[frame]
        if rle is not None:
            box, mask = _boxed(rle)
            np.copyto(indices[box], 1 + 2 * colour, where=mask)
            np.copyto(indices[box], 2 + 2 * colour, where=_edge(mask))
    picture = Image.fromarray(indices).resize(shown_hw[::-1], Image.Resampling.NEAREST)
    picture.putpalette([0, 0, 0, *(value for colour in PALETTE for _ in range(2) for value in colour)])
    return _data_url(picture, "PNG", transparency=bytes([0, *([128, 255] * len(PALETTE))]))


def _boxed(rle: Rle) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Where a mask's box lies in its frame, and the mask within."""
    left, top, width, height = coco_mask.toBbox(rle.to_json()).astype(int).tolist()
    box = (slice(top, top + height), slice(left, left + width))
    return box, masks.mask(rle)[box].astype(bool)


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a mask (h, w) of which one of the four neighbours, or none at the border, is not in it."""
    around = np.pad(mask, 1)
    return mask & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])


def read_image(folder: Path, video: Video, frame: int) -> NDArray[np.uint8]:
    """Read a frame (h, w, 3) from the data set; raises FrameError where it is not there."""
    path = folder / video.file_names[frame]
    try:
        with Image.open(path) as opened:
            return np.array(to_rgb(opened, path))
    except OSError as error:
        raise FrameError(
            "the report needs the data set's frames",
            where=path,
            hint="set data.root to the data set's folder",
        ) from error


def jpeg_data_url(image: NDArray[np.uint8]) -> str:
    """Encode a picture so that it lies inside the page."""
    return _data_url(Image.fromarray(image), "JPEG", quality=85)


def _data_url(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
