"""Pseudo-videos: a labelled image, cut out, turned and resized anew for every frame, as in SeqFormer and VITA.

Their labels are those of a data set of videos whose frames are the transformed images: a frame's file name is the
image's, `@` and the transform, so that another transform is another frame.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.errors import AnnotationError
from cache.labels import masks
from cache.labels.category_map import category_pairs
from cache.labels.masks import Rle
from cache.labels.stills import Still, StillObject, load_stills
from cache.labels.tracks import Category, Labels, Track, Video, mask_areas
from cache.media.geometry import Transform, TransformRanges
from configs.schema import PseudoSettings


@dataclass(frozen=True, kw_only=True)
class PseudoVideo:
    """An image and the transform that makes each frame of it; `categories` translates those of its objects."""

    still: Still
    transforms: tuple[Transform, ...]
    categories: Mapping[int, int]


def draw_pseudo_videos(chosen: PseudoSettings, file: Path, categories: Sequence[Category]) -> list[PseudoVideo]:
    """Draw images that show one of `categories`, and their transforms; image n has the same, whichever are drawn.

    Raises AnnotationError where the label file is broken, or no image shows any of the categories.
    """
    stills = load_stills(file)
    pairs = category_pairs(categories, [category.name for category in stills.categories])
    translation = {stills.categories[there].id: categories[here].id for here, there in pairs}
    usable = [still for still in stills.stills if any(found.category_id in translation for found in still.objects)]
    if not usable:
        names = ", ".join(category.name for category in stills.categories[:8])
        hint = "objects are matched by the names of their categories (cache/labels/category_map.py)"
        raise AnnotationError("no image shows a category of the train labels", where=file, got=names, hint=hint)
    order = np.random.default_rng([chosen.seed, 0]).permutation(len(usable))[: chosen.num_images]
    ranges = transform_ranges(chosen)
    return [
        PseudoVideo(
            still=still,
            transforms=ranges.draw(
                np.random.default_rng([chosen.seed, 1, abs(still.id)]), (still.height, still.width), chosen.num_frames
            ),
            categories=translation,
        )
        for still in (usable[index] for index in sorted(order.tolist()))
    ]


def transform_ranges(chosen: PseudoSettings) -> TransformRanges:
    """What the transforms of an image are drawn from."""
    return TransformRanges(
        resize_edges=tuple(chosen.resize_edges),
        crop_sides=(chosen.crop_sides[0], chosen.crop_sides[1]),
        short_edges=tuple(chosen.short_edges),
        rotation=chosen.rotation,
        flip=chosen.flip,
    )


def labels_json(videos: Sequence[PseudoVideo], categories: Sequence[Category]) -> bytes:
    """The label file (YTVIS JSON) of pseudo-videos."""
    return json.dumps(pseudo_labels(videos, categories).to_json()).encode()


def pseudo_labels(videos: Sequence[PseudoVideo], categories: Sequence[Category]) -> Labels:
    """The labels of pseudo-videos: every mask transformed as its frame is."""
    tracks: list[Track] = []
    for pseudo in videos:
        for found in pseudo.still.objects:
            if found.category_id in pseudo.categories:
                tracks += _track(pseudo, found, len(tracks) + 1)
    return Labels(
        categories=tuple(categories), videos=tuple(map(_video, videos)), tracks=tuple(tracks), has_tracks=True
    )


def _video(pseudo: PseudoVideo) -> Video:
    height, width = pseudo.transforms[0].size
    names = tuple(f"{pseudo.still.file_name}@{transform.name}" for transform in pseudo.transforms)
    return Video(id=pseudo.still.id, height=height, width=width, length=len(names), file_names=names)


def _track(pseudo: PseudoVideo, found: StillObject, track_id: int) -> list[Track]:
    """The object's track; none where no frame shows it."""
    whole = masks.mask(found.mask(pseudo.still.height, pseudo.still.width))
    shown: list[Rle | None] = []
    for transform in pseudo.transforms:
        mask = transform.on_mask(whole)
        shown.append(masks.encode(mask) if mask.any() else None)
    if not any(shown):
        return []
    return [
        Track(
            id=track_id,
            video_id=pseudo.still.id,
            category_id=pseudo.categories[found.category_id],
            iscrowd=False,
            segmentations=tuple(shown),
            areas=mask_areas(shown),
        )
    ]
