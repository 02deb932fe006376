"""The labels of a clip's frames, decoded into its memory.

Shapes: N objects, T frames, h×w input pixels without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from cache.labels import masks
from cache.labels.masks import Rle
from cache.labels.tracks import Labels, Track
from cache.media.geometry import Transform
from train_head.data.clip_loader import Empty
from train_head.losses.targets import ClipTargets, clip_targets

_REMEMBERED_MASKS = 1 << 17
"""Of every data worker: all of YouTube-VIS 2019, 150 MB. Where few came again, remembering would cost a third more."""


def shown_mask(rle: Rle, transform: Transform) -> NDArray[np.uint8]:
    """The mask (h, w) as a transform shows it (nearest, as the release)."""
    return transform.on_mask(masks.mask(rle))


def remembered_mask(rle: Rle, transform: Transform) -> NDArray[np.uint8]:
    """The same, of masks that come again: labels of 720p take a fourth of the time."""
    if transform.size == (rle.height, rle.width):
        return shown_mask(rle, transform)
    return masks.mask(_by_rows(rle, transform)).T


@lru_cache(maxsize=_REMEMBERED_MASKS)
def _by_rows(rle: Rle, transform: Transform) -> Rle:
    """The shown mask's transpose: what is decoded column by column then lies in memory row by row."""
    return masks.encode(shown_mask(rle, transform).T)


def read_targets(
    labels: Labels,
    video_id: int,
    frames: Sequence[int],
    transforms: Sequence[Transform],
    empty: Empty = np.empty,
    mask: Callable[[Rle, Transform], NDArray[np.uint8]] = shown_mask,
) -> ClipTargets:
    """Decode the labels of some frames of a video, each as its transform shows it, into memory of `empty`."""
    tracks = [track for track in labels.tracks_of(video_id) if not track.iscrowd]
    seen = [number for number, track in enumerate(tracks) if _is_seen(track, frames)]
    masks_NThw = empty((len(seen), len(frames), *transforms[0].size), np.dtype(np.uint8))
    for masks_Thw, number in zip(masks_NThw, seen, strict=True):
        for mask_hw, frame, transform in zip(masks_Thw, frames, transforms, strict=True):
            rle = tracks[number].segmentations[frame]
            mask_hw[:] = 0 if rle is None else mask(rle, transform)
    categories = [labels.category_index[tracks[number].category_id] for number in seen]
    return clip_targets(
        torch.tensor(categories, dtype=torch.int64),
        torch.tensor(seen, dtype=torch.int64),
        torch.from_numpy(masks_NThw),
    )


def _is_seen(track: Track, frames: Sequence[int]) -> bool:
    return any(track.segmentations[frame] is not None for frame in frames)
