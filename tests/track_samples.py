"""Objects of tests/naive_video_ap.py as label files and predictions have them."""

from __future__ import annotations

from cache.labels import masks
from cache.labels.tracks import Category, Labels, Track, Video
from evaluate.results import TrackPrediction
from tests.naive_video_ap import Object

CATEGORIES = [3, 8]


def _segmentations(item: Object) -> tuple[masks.Rle | None, ...]:
    """Empty frames as None and as an empty mask in turn: they mean the same."""
    pixels = item.cells.repeat(item.scale, axis=1).repeat(item.scale, axis=2)
    return tuple(None if t % 2 == 0 and not frame.any() else masks.encode(frame) for t, frame in enumerate(pixels))


def as_files_have_it(videos: list[int], objects: list[Object]) -> tuple[Labels, list[TrackPrediction]]:
    tracks, predictions, sizes = [], [], {}
    for number, item in enumerate(objects):
        sizes[item.video] = (len(item.cells), *(edge * item.scale for edge in item.cells.shape[1:]))
        fields = {"video_id": item.video, "category_id": item.category, "segmentations": _segmentations(item)}
        if item.score is None:
            areas = tuple(float(frame.sum()) * item.scale**2 for frame in item.cells)
            tracks.append(Track(id=number, iscrowd=item.crowd, areas=areas, **fields))  # type: ignore[arg-type]
        else:
            predictions.append(TrackPrediction(score=item.score, **fields))  # type: ignore[arg-type]
    labels = Labels(
        categories=tuple(Category(id=number, name=f"c{number}") for number in CATEGORIES),
        videos=tuple(video_of(video, *sizes.get(video, (1, 1, 1))) for video in videos),
        tracks=tuple(tracks),
        has_tracks=True,
    )
    return labels, predictions


def video_of(video_id: int, length: int, height: int, width: int) -> Video:
    names = tuple(f"v{video_id}/{frame}.jpg" for frame in range(length))
    return Video(id=video_id, width=width, height=height, length=length, file_names=names)
