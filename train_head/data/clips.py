"""Clips of cached videos: which ones, in which order, and everything a training step needs of them.

Clip number i of a run depends on (seed, i) alone, so a run can stop and resume anywhere, with any number of
data workers, and see the same clips. An epoch of a mixture is one permutation of every video of the first source
and `ratio` times as many of each other source.

Shapes: T frames, L detector layers, Q frame queries, C channels, R stored channels, H×W the stored map,
N objects, h×w input pixels without padding.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import AnnotationError, ConfigError, shown
from cache.labels.tracks import Labels
from cache.layout import Size, View, video_group_name
from cache.media.geometry import transform_of
from cache.reader import ClipArrays, FeatureCache
from train_head.data.clip_labels import read_targets, remembered_mask
from train_head.data.clip_loader import Empty
from train_head.data.upload import Copy
from train_head.draws import ClipDraw
from train_head.losses.targets import ClipTargets

USUAL_OBJECTS = 8
"""What the masks of a clip are given room for (see clip_loader.ClipReader); videos rarely show more."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How clips are drawn: T frames within `frame_range` of a random reference frame of the video."""

    num_frames: int
    frame_range: int
    seed: int
    replacement: bool = True


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Labelled videos of one cache that clips are drawn from."""

    feature_cache: FeatureCache
    labels: Labels
    views: Mapping[int, tuple[View, ...]] = field(default_factory=dict)
    """Video id -> the views that a clip shows one of, with equal chances; where none are given, the video itself."""
    ratio: float = 1.0
    """Clips for each clip of the first source."""

    def views_of(self, video_id: int) -> tuple[View, ...]:
        """The views of a video that clips may show."""
        return self.views.get(video_id, (View(),))


@dataclass(frozen=True, kw_only=True)
class Clip:
    """T frames of one video, in order."""

    index: int
    key: str  # of the video in this run: no other video, view or source has the same
    name: str  # for people: the video's, and the view's
    num_tracks: int  # of the whole video
    frames: tuple[int, ...]
    frame_queries_TLQC: Tensor  # as stored: before the detector's decoder_norm
    map_TRHW: Tensor  # encoded: in the codec's number type, H×W blocks of pixels where it stores blocks
    map_hw: Size  # of the map in pixels, which MapDecoding.expand makes of them
    targets: ClipTargets
    cache: str = "CACHE"  # the path of its cache, for messages

    def placed(self, copy: Copy, layers: slice) -> Clip:
        """The clip copied, with some of its detector layers."""
        return replace(
            self,
            frame_queries_TLQC=copy(self.frame_queries_TLQC)[:, layers],
            map_TRHW=copy(self.map_TRHW),
            targets=self.targets.placed(copy),
        )


@dataclass(frozen=True, kw_only=True)
class DrawnClip:
    """Which frames a clip takes of which video; `source` is the position of its labels in the stream."""

    source: int
    video_id: int
    frames: tuple[int, ...]


class ClipStream:
    """Which frames of which video clip i of an endless, shuffled stream takes."""

    def __init__(
        self,
        labels: Sequence[Labels],
        ratios: Sequence[float],
        config: ClipConfig,
        places: Iterable[object] = ("the train labels",),
    ) -> None:
        """Mix label sets: `ratios` are clips of each for a clip of the first, whose own is not looked at.

        Videos without an object are left out, as in the release. Raises AnnotationError where a set has no others,
        ConfigError where no clip would be of it; `places` say which.
        """
        self.labels, self.config = labels, config
        self.video_ids = [[video.id for video in part.videos if part.tracks_of(video.id)] for part in labels]
        count = len(self.video_ids[0])
        self._shares = [count, *(round(count * ratio) for ratio in ratios[1:])]
        for place, ids, share, ratio in zip_longest(places, self.video_ids, self._shares, ratios):
            if not ids:
                raise AnnotationError("no video with a labelled object to train on", where=place)
            if not share:
                what = (
                    f"a ratio of {ratio:g} is less than one clip for the {count} train videos, so none would be shown"
                )
                raise ConfigError(
                    what, where=place, hint=f"raise its ratio to {1 / count:.2g} or more, or leave it out"
                )
        self._ends = list(accumulate(self._shares))

    def draw(self, index: int) -> DrawnClip:
        """Clip number `index`, 0 or more, without an upper bound."""
        source, video_id = self.video_at(index)
        rng, config = np.random.default_rng([self.config.seed, ClipDraw.frames, index]), self.config
        length = self.labels[source].video_by_id[video_id].length
        frames = draw_frames(rng, length, config.num_frames, config.frame_range, config.replacement)
        return DrawnClip(source=source, video_id=video_id, frames=frames)

    def video_at(self, index: int) -> tuple[int, int]:
        """Return (source, video id) of clip `index`: no source repeats a video before it has shown all of them."""
        seed, count = self.config.seed, self._ends[-1]
        epoch, place = divmod(index, count)
        slot = int(_permutation((seed, ClipDraw.videos, epoch), count)[place])
        source = bisect_right(self._ends, slot)
        ids, share = self.video_ids[source], self._shares[source]
        if source == 0:
            return source, ids[slot]
        shown = epoch * share + slot - self._ends[source - 1]
        own_epoch, place = divmod(shown, len(ids))
        order = _permutation((seed, ClipDraw.mixed_videos, source, own_epoch), len(ids))
        return source, ids[int(order[place])]


class ClipDataset:
    """The clips of a stream over the videos of one cache or several, read from there."""

    def __init__(self, sources: Sequence[ClipSource], stream: ClipStream) -> None:
        """`stream` draws from the sources' labels. Raises IncompleteVideo where a cache lacks a view of a video."""
        self.sources, self.stream = sources, stream
        self._cached = {
            _key(number, video_id, view): source.feature_cache.video(video_group_name(video_id, view))
            for number, (source, video_ids) in enumerate(zip(sources, stream.video_ids, strict=True))
            for video_id in video_ids
            for view in source.views_of(video_id)
        }

    @property
    def clip_bytes(self) -> int:
        """A clip's features and masks, of the largest frames."""
        videos = list(self._cached.values())
        queries, maps = videos[0].queries, videos[0].maps
        largest_map = max(height * width for height, width in (video.stored_hw for video in videos))
        largest_image = max(height * width for height, width in (video.attributes.image_hw for video in videos))
        query_bytes = math.prod(queries.shape[1:]) * queries.dtype.itemsize
        map_bytes = largest_map * maps.shape[1] * maps.dtype.itemsize
        return self.stream.config.num_frames * (query_bytes + map_bytes + USUAL_OBJECTS * largest_image)

    def read(self, index: int, empty: Empty) -> Clip:
        """Read clip number `index`, in one of its video's views."""
        drawn = self.stream.draw(index)
        source, video_id, frames = self.sources[drawn.source], drawn.video_id, drawn.frames
        views = source.views_of(video_id)
        rng = np.random.default_rng([self.stream.config.seed, ClipDraw.view, index])
        view = views[int(rng.integers(len(views)))]
        key = _key(drawn.source, video_id, view)
        cached = self._cached[key]
        buffers = [empty((len(frames), *array.shape[1:]), array.dtype) for array in (cached.queries, cached.maps)]
        clip = cached.read_clip(frames, ClipArrays(frame_queries=buffers[0], mask_features=buffers[1]))
        video_name = source.labels.video_by_id[video_id].name
        return Clip(
            index=index,
            key=key,
            name=f"{video_name}@{view.name}" if view.name else video_name,
            cache=shown(source.feature_cache.path),
            num_tracks=len(source.labels.tracks_of(video_id)),
            frames=frames,
            frame_queries_TLQC=torch.from_numpy(clip.frame_queries),
            map_TRHW=torch.from_numpy(clip.mask_features),
            map_hw=cached.attributes.map_hw,
            targets=read_targets(
                source.labels, video_id, frames, [transform_of(cached.attributes)] * len(frames), empty, remembered_mask
            ),
        )


def _key(source: int, video_id: int, view: View) -> str:
    return f"{source}/{video_group_name(video_id, view)}"


@lru_cache(maxsize=16)
def _permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    return np.random.default_rng(key).permutation(count)


def draw_frames(
    rng: np.random.Generator, video_length: int, num_frames: int, frame_range: int, replacement: bool = True
) -> tuple[int, ...]:
    """Draw a clip's frames in ascending order: a reference frame and others within `frame_range` of it.

    VITA: by default the others are drawn with replacement, as in the release. Without it, frames repeat only
    where there are not enough; a video of one frame always repeats it.
    """
    reference = int(rng.integers(video_length))
    near = range(max(0, reference - frame_range), min(video_length, reference + frame_range + 1))
    others = [frame for frame in near if frame != reference] or [reference]
    if replacement:
        drawn = rng.choice(others, num_frames - 1)
    else:
        rounds = -(-(num_frames - 1) // len(others))
        shuffled = [int(frame) for _ in range(rounds) for frame in rng.permutation(others)]
        drawn = np.array(shuffled[: num_frames - 1], dtype=np.int64)
    return tuple(sorted([reference, *map(int, drawn)]))
