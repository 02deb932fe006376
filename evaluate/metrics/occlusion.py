"""How much the objects of a video hide each other: the bounding-box occlusion rate of OVIS.

Qi et al., "Occluded Video Instance Segmentation: A Benchmark", IJCV 2022: the rate of a frame is the area that two
or more of the objects' boxes cover over the area that any covers; mBOR is its mean over frames that show an object.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from pycocotools import mask as coco_mask

from cache.labels.tracks import Labels, Occlusion, Track
from evaluate.metrics.weighted import FloatArray


def occlusion_rate(labels: Labels, video_id: int) -> float:
    """The mBOR of one video, in [0, 1]; 0 where no frame shows an object."""
    rates = []
    for frame in range(labels.video_by_id[video_id].length):
        masks = [track.segmentations[frame] for track in labels.tracks_of(video_id)]
        boxes = coco_mask.toBbox([mask.to_json() for mask in masks if mask is not None])
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        boxes = boxes[boxes[:, 2:].prod(axis=1) > 0]
        if len(boxes):
            rates.append(box_occlusion(boxes))
    return float(np.mean(rates)) if rates else 0.0


def box_occlusion(boxes_N4: FloatArray) -> float:
    """Area under two or more boxes (x, y, width, height) over the area under any."""
    left, top, right, bottom = boxes_N4[:, 0], boxes_N4[:, 1], boxes_N4[:, 0], boxes_N4[:, 1]
    right, bottom = right + boxes_N4[:, 2], bottom + boxes_N4[:, 3]
    # All edges cut the frame into cells, each of which a box covers wholly or not at all.
    xs, ys = np.unique([left, right]), np.unique([top, bottom])
    in_x = (left[:, None] <= xs[:-1]) & (xs[:-1] < right[:, None])
    in_y = (top[:, None] <= ys[:-1]) & (ys[:-1] < bottom[:, None])
    covers_YX = np.einsum("ny,nx->yx", in_y.astype(np.int64), in_x.astype(np.int64))
    area_YX = np.diff(ys)[:, None] * np.diff(xs)
    return float(area_YX[covers_YX > 1].sum() / area_YX[covers_YX > 0].sum())


def annotated_level(track: Track) -> Occlusion:
    """The occlusion level that the label file gives an object in most of its frames; None where it gives none."""
    levels = Counter(level for level in track.occlusion or () if level is not None)
    return min(levels, key=lambda level: (-levels[level], str(level))) if levels else None
