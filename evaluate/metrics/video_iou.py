"""The overlap of tracks, as YouTube-VIS defines it: sum over frames of intersections over sum of unions.

The masks of a video, side by side, are one mask; so stock pycocotools intersects whole tracks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from cache.labels import masks
from cache.labels.masks import Rle
from cache.labels.tracks import Video
from evaluate.metrics.weighted import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackMasks:
    """All masks of a track, side by side in chunks that pycocotools can hold (one chunk for most videos)."""

    chunks: tuple[dict[str, object], ...]
    pixels: int  # foreground of all frames
    iscrowd: bool = False

    @classmethod
    def of(cls, segmentations: Sequence[Rle | None], video: Video, *, iscrowd: bool = False) -> TrackMasks:
        """Join the masks of a track's frames."""
        frames = max(1, masks.MAX_PIXELS // (video.height * video.width))
        chunks = [
            masks.side_by_side(segmentations[start : start + frames], video.height, video.width).to_json()
            for start in range(0, video.length, frames)
        ]
        return cls(chunks=tuple(chunks), pixels=int(masks.coded_areas(chunks).sum()), iscrowd=iscrowd)


def track_ious(found: Sequence[TrackMasks], labelled: Sequence[TrackMasks]) -> FloatArray:
    """Video IoUs (D, G) of tracks of one video; with a crowd the intersection over the found track's area."""
    intersections = np.zeros((len(found), len(labelled)))
    if not intersections.size:
        return intersections
    found_chunks = zip(*(track.chunks for track in found), strict=True)
    label_chunks = zip(*(track.chunks for track in labelled), strict=True)
    for left, right in zip(found_chunks, label_chunks, strict=True):
        # Against a crowd pycocotools divides by D's area alone: times that area, rounded, the
        # intersection is exact, and chunks of one video can be added up.
        over_found = coco_mask.iou(list(left), list(right), [1] * len(labelled))
        intersections += np.rint(over_found * masks.coded_areas(left)[:, None])
    found_areas = np.array([[track.pixels] for track in found])
    label_areas = np.array([[track.pixels for track in labelled]])
    crowd = np.array([[track.iscrowd for track in labelled]])
    unions = np.where(crowd, found_areas, found_areas + label_areas - intersections)
    return intersections / np.maximum(unions, 1)
