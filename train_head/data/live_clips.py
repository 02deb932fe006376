"""Clips of images for fine-tuning: read, augmented and labelled (VITA's augmentations).

Shapes: T frames, H×W input pixels without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache.labels.tracks import Video
from cache.media.geometry import Transform, TransformRanges, network_size
from configs.schema import FinetuneSettings
from train_head.data.clip_labels import read_targets
from train_head.data.clip_loader import Empty
from train_head.data.clips import USUAL_OBJECTS, ClipStream
from train_head.data.upload import Copy
from train_head.draws import ClipDraw
from train_head.losses.targets import ClipTargets

FrameReader = Callable[[Video, int], Image.Image]
"""The RGB image of one frame of a video, of the size that the labels say."""


@dataclass(frozen=True, kw_only=True)
class LiveClip:
    """T frames of one video as images, transformed to one size."""

    index: int
    name: str  # of the video, for people
    frames: tuple[int, ...]
    images_T3HW: Tensor  # uint8 RGB, unpadded
    targets: ClipTargets

    def placed(self, copy: Copy) -> LiveClip:
        """The clip copied."""
        return replace(self, images_T3HW=copy(self.images_T3HW), targets=self.targets.placed(copy))


class LiveClips:
    """The clips of a stream, from image files; clip i and its augmentation depend on (seed, i) alone."""

    def __init__(
        self,
        stream: ClipStream,
        readers: Sequence[FrameReader],
        short_edge: int | None,
        chosen: FinetuneSettings | None,
        stills: TransformRanges | None = None,
    ) -> None:
        """`readers`: one for each source of the stream; they travel to worker processes.

        `chosen`: the augmentation of the first source, the videos; None resizes to `short_edge`, as extraction does.
        `stills`: that of a second one, images of which every clip makes another pseudo-video.
        """
        self.stream, self.readers, self.short_edge, self.chosen = stream, readers, short_edge, chosen
        self.stills = stills

    @property
    def clip_bytes(self) -> int:
        """A clip's images and masks, of the largest frames."""
        short_edge = max(self.chosen.short_edges) if self.chosen and self.chosen.short_edges else self.short_edge
        sizes = [network_size((v.height, v.width), short_edge) for part in self.stream.labels for v in part.videos]
        return self.stream.config.num_frames * (3 + USUAL_OBJECTS) * max(height * width for height, width in sizes)

    def read(self, index: int, empty: Empty) -> LiveClip:
        """Read, transform and label the frames of clip number `index`; masks alone go into `empty`."""
        drawn = self.stream.draw(index)
        labels, video_id, frames = self.stream.labels[drawn.source], drawn.video_id, drawn.frames
        video = labels.video_by_id[video_id]
        transforms = self.transforms(index, video, len(frames), from_still=drawn.source > 0)
        decoded = {frame: self.readers[drawn.source](video, frame) for frame in set(frames)}
        images = [transform.on_image(decoded[frame]) for frame, transform in zip(frames, transforms, strict=True)]
        return LiveClip(
            index=index,
            name=video.name,
            frames=frames,
            images_T3HW=torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2),
            targets=read_targets(labels, video_id, frames, transforms, empty),
        )

    def transforms(self, index: int, video: Video, num_frames: int, *, from_still: bool) -> tuple[Transform, ...]:
        """Those of clip `index`: one for all frames of a video, each frame's own where an image plays the video."""
        original_hw = (video.height, video.width)
        rng = np.random.default_rng([self.stream.config.seed, ClipDraw.view, index])
        if from_still:
            assert self.stills is not None
            return self.stills.draw(rng, original_hw, num_frames)
        return (self._transform(rng, original_hw),) * num_frames

    def _transform(self, rng: np.random.Generator, original_hw: tuple[int, int]) -> Transform:
        chosen = self.chosen
        if chosen is None:
            return Transform.resize(original_hw, network_size(original_hw, self.short_edge))
        if rng.random() < chosen.crop_share:
            ranges = TransformRanges(
                resize_edges=tuple(chosen.resize_edges),
                crop_sides=(chosen.crop_sides[0], chosen.crop_sides[1]),
                short_edges=tuple(chosen.short_edges),
                flip=chosen.flip,
            )
            return ranges.draw(rng, original_hw, 1)[0]
        short_edge = int(rng.choice(chosen.short_edges)) if chosen.short_edges else self.short_edge
        size = network_size(original_hw, short_edge)
        return Transform(crop=(0, 0, *original_hw), size=size, flip=chosen.flip and bool(rng.random() < 0.5))
