"""Parts of a split on which runs are compared: categories, video lengths, object sizes, occlusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.labels.tracks import Labels, Track, Video
from evaluate.metrics.occlusion import annotated_level, occlusion_rate
from evaluate.metrics.video_ap import ALL_AREAS, AREA_RANGES, AreaRange, VideoEvaluation, mean_area
from evaluate.metrics.weighted import FloatArray, weighted_scores


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some videos, or some objects: the others are then ignored, as COCO ignores objects of other sizes."""

    kind: str
    name: str
    num_objects: int
    category: int | None = None  # class index; None: all
    videos: frozenset[int] | None = None  # ids; None: all
    areas: AreaRange = ALL_AREAS
    objects: frozenset[int] | None = None  # indices of the label file's tracks; None: all

    def average_precision(self, evaluation: VideoEvaluation, weights_SV: FloatArray) -> FloatArray:
        """AP on this part under each set of weights of all videos, (S,); NaN where it has nothing to find."""
        if self.areas == ALL_AREAS and self.objects is None:
            matches = evaluation.matches
        else:
            matches = evaluation.matches_of(self.areas, self.objects)
        if self.category is not None:
            matches = [matches[self.category]]
        if self.videos is not None:
            weights_SV = weights_SV * np.array([video.id in self.videos for video in evaluation.labels.videos])
        return weighted_scores(matches, weights_SV).headline()["AP"]


def parts_of(labels: Labels) -> list[Part]:
    """All parts of a split that hold an object: by category, length, size and occlusion.

    Lengths and occlusion cut the videos, sizes the objects, into thirds of equal number (fewer where many are
    equal); sizes also as the benchmarks have them. Occlusion is mBOR, and the label file's own level where it has one.
    """
    parts = [*_categories(labels), *_by_video(labels, "video length", lambda video: video.length, "{:.0f}", "frames")]
    parts += _sizes(labels)
    rates = {video.id: occlusion_rate(labels, video.id) for video in labels.videos}
    parts += _by_video(labels, "occlusion (mBOR)", lambda video: 100 * rates[video.id], "{:.1f}", "%")
    parts += _annotated_occlusion(labels)
    return [part for part in parts if part.num_objects]


def _categories(labels: Labels) -> Iterator[Part]:
    for index, category in enumerate(labels.categories):
        count = _count(labels, lambda track, wanted=category.id: track.category_id == wanted)  # type: ignore[misc]
        yield Part(kind="category", name=category.name, num_objects=count, category=index)


def _by_video(labels: Labels, kind: str, value: Callable[[Video], float], form: str, unit: str) -> Iterator[Part]:
    values = [value(video) for video in labels.videos]
    for low, high in thirds(values):
        inside = frozenset(video.id for video in labels.videos if low <= value(video) <= high)
        limits = [form.format(low), form.format(high)]
        name = f"{'–'.join(dict.fromkeys(limits))} {unit}"
        count = _count(labels, lambda track, ids=inside: track.video_id in ids)  # type: ignore[misc]
        yield Part(kind=kind, name=name, num_objects=count, videos=inside)


def _sizes(labels: Labels) -> Iterator[Part]:
    sizes = {index: mean_area(track.areas) for index, track in enumerate(labels.tracks) if not track.iscrowd}
    names = {"s": "small, < 128² px", "m": "medium, < 256² px", "l": "large"}
    for letter, areas in AREA_RANGES.items():
        count = sum(areas[0] <= size <= areas[1] for size in sizes.values())
        yield Part(kind="object size", name=names[letter], num_objects=count, areas=areas)
    for low, high in thirds(list(sizes.values())):
        count = sum(low <= size <= high for size in sizes.values())
        name = f"a third: {np.sqrt(low):.0f}²–{np.sqrt(high):.0f}² px"
        yield Part(kind="object size", name=name, num_objects=count, areas=(low, high))


def _annotated_occlusion(labels: Labels) -> Iterator[Part]:
    levels = {index: annotated_level(track) for index, track in enumerate(labels.tracks) if not track.iscrowd}
    for level in sorted({level for level in levels.values() if level is not None}, key=str):
        chosen = frozenset(index for index, own in levels.items() if own == level)
        yield Part(kind="occlusion (as labelled)", name=str(level), num_objects=len(chosen), objects=chosen)


def thirds(values: Sequence[float]) -> list[tuple[float, float]]:
    """Closed ranges that cut values into up to three parts of about equal number, equal values together."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not len(ordered):
        return []
    upper = np.unique(np.quantile(ordered, [1 / 3, 2 / 3, 1.0], method="lower"))
    lower = [ordered[0], *(ordered[ordered > limit].min() for limit in upper[:-1])]
    return [(float(low), float(high)) for low, high in zip(lower, upper, strict=True)]


def _count(labels: Labels, chosen: Callable[[Track], bool]) -> int:
    return sum(chosen(track) and not track.iscrowd for track in labels.tracks)
