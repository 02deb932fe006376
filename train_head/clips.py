"""Clips of cached videos: which ones, in which order, and everything a training step needs of them.

Clip number i of a run depends on (seed, i) alone, so a run can stop and resume anywhere, with any number of
data workers, and see the same clips.

Shapes: T frames, L detector layers, Q frame queries, C channels, R stored channels, H×W the stored map,
N objects, h×w input pixels without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from cache import masks
from cache.errors import AnnotationError
from cache.frames import FrameArray
from cache.geometry import Transform
from cache.labels import Labels
from cache.layout import video_group_name
from cache.reader import FeatureCache
from train_head.targets import ClipTargets, clip_targets


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How clips are drawn: T frames within `frame_range` of a random reference frame of the video."""

    num_frames: int
    frame_range: int
    seed: int
    replacement: bool = True


@dataclass(frozen=True, kw_only=True)
class Clip:
    """T frames of one video, in order."""

    index: int
    video_id: int
    frames: tuple[int, ...]
    frame_queries_TLQC: Tensor  # as stored: before the detector's decoder_norm
    map_TRHW: Tensor  # as stored, in the codec's number type
    targets: ClipTargets

    def pin_memory(self) -> Clip:
        """Copy to page-locked memory (called by the data loader)."""
        return Clip(
            index=self.index,
            video_id=self.video_id,
            frames=self.frames,
            frame_queries_TLQC=self.frame_queries_TLQC.pin_memory(),
            map_TRHW=self.map_TRHW.pin_memory(),
            targets=self.targets.pin_memory(),
        )


class ClipStream:
    """Which frames of which video clip i of an endless, shuffled stream takes."""

    def __init__(self, labels: Labels, video_ids: Sequence[int], config: ClipConfig) -> None:
        """`video_ids`: the videos to train on; those without a labelled object are left out, as in the release.

        Raises AnnotationError where nothing is left.
        """
        self.labels, self.config = labels, config
        self.video_ids = [video_id for video_id in video_ids if labels.tracks_of(video_id)]
        if not self.video_ids:
            raise AnnotationError("no video with a labelled object to train on", where="the train labels")
        self._epochs: dict[int, np.ndarray] = {}

    def draw(self, index: int) -> tuple[int, tuple[int, ...]]:
        """Video and frames of clip `index`, 0 or more, without an upper bound."""
        video_id, config = self.video_at(index), self.config
        rng = np.random.default_rng([config.seed, 1, index])
        video_length = self.labels.video_by_id[video_id].length
        return video_id, draw_frames(rng, video_length, config.num_frames, config.frame_range, config.replacement)

    def video_at(self, index: int) -> int:
        """Return the video of clip `index`: every epoch is its own permutation of all videos."""
        epoch, position = divmod(index, len(self.video_ids))
        if epoch not in self._epochs:
            permutation = np.random.default_rng([self.config.seed, 0, epoch]).permutation(len(self.video_ids))
            self._epochs = {epoch: permutation}
        return self.video_ids[int(self._epochs[epoch][position])]


class ClipDataset(Dataset[Clip]):
    """The clips of a stream, from the cache."""

    def __init__(self, feature_cache: FeatureCache, stream: ClipStream) -> None:
        """Raises IncompleteVideo where the cache lacks a video of the stream."""
        self.feature_cache, self.stream = feature_cache, stream
        for video_id in stream.video_ids:
            feature_cache.video(video_group_name(video_id))

    def __getitem__(self, index: int) -> Clip:
        """Read clip number `index`."""
        video_id, frames = self.stream.draw(index)
        cached = self.feature_cache.video(video_group_name(video_id))
        transform = Transform.resize(cached.attributes.original_hw, cached.attributes.image_hw)
        return Clip(
            index=index,
            video_id=video_id,
            frames=frames,
            frame_queries_TLQC=read_into_tensor(cached.queries, frames),
            map_TRHW=read_into_tensor(cached.maps, frames),
            targets=read_targets(self.stream.labels, video_id, frames, [transform] * len(frames)),
        )


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


def read_into_tensor(array: FrameArray, frames: Sequence[int]) -> Tensor:
    """Read frames of a field; in a worker process straight into shared memory, where its tensors must go anyway."""
    if get_worker_info() is None:
        return torch.from_numpy(array.read(frames))
    shape = (len(frames), *array.shape[1:])
    num_bytes = int(np.prod(shape)) * array.dtype.itemsize
    # As torch's own default_collate does.
    shared = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    tensor = torch.empty(0, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype).set_(shared).view(shape)
    array.read(frames, tensor.numpy())
    return tensor


def read_targets(labels: Labels, video_id: int, frames: Sequence[int], transforms: Sequence[Transform]) -> ClipTargets:
    """Decode the labels of some frames of a video, transformed as the network's input was, each by its own."""
    tracks = [track for track in labels.tracks_of(video_id) if not track.iscrowd]
    masks_NThw = torch.zeros(len(tracks), len(frames), *transforms[0].size, dtype=torch.uint8)
    for row, track in enumerate(tracks):
        for column, (frame, transform) in enumerate(zip(frames, transforms, strict=True)):
            rle = track.segmentations[frame]
            if rle is not None:
                masks_NThw[row, column] = torch.from_numpy(transform.on_mask(masks.mask(rle)))
    return clip_targets(
        torch.tensor([labels.category_index[track.category_id] for track in tracks], dtype=torch.int64),
        torch.arange(len(tracks)),
        masks_NThw,
    )
