"""From a config to labelled frames and still images: what fine-tuning trains on. How they are read is stage one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from cache.labels.tracks import Category, Labels, Video
from cache.media.geometry import Transform
from configs.schema import Settings
from configs.splits import SplitPaths, pseudo_split, train_split
from train_head.data.live_clips import LiveClips
from train_head.data.sources import clip_stream


@dataclass(frozen=True, kw_only=True)
class FrameFolder:
    """Reads a data set's frames; an object that travels to worker processes."""

    path: Path

    def __call__(self, video: Video, frame: int) -> Image.Image:
        """Decode one frame; raises FrameError."""
        from extract.frames import read_frame  # noqa: TID251

        return read_frame(self.path / video.file_names[frame], (video.height, video.width))


def open_live_clips(settings: Settings, labels: Labels, *, num_frames: int | None, augment: bool) -> LiveClips:
    """Clips of the frames of `labels`, the training videos, and of pseudo-videos where the config has them.

    `num_frames` None takes `train.num_frames`. `augment=False` gives frames in the size that a cache holds.
    """
    train, split = train_split(settings), pseudo_split(settings)
    sets, readers, ratios, places = [labels], [FrameFolder(path=train.frames)], [1.0], [train.labels]
    stills = None
    if split is not None:
        from extract.pseudo import transform_ranges  # noqa: TID251

        sets.append(_still_labels(settings, split, labels.categories))
        readers.append(FrameFolder(path=split.frames))
        ratios.append(settings.pseudo.ratio)
        places.append(split.labels)
        stills = transform_ranges(settings.pseudo)
    stream = clip_stream(settings, sets, ratios, places, num_frames=num_frames)
    chosen = settings.finetune if augment else None
    return LiveClips(stream, readers, settings.detector.short_edge, chosen, stills)


def _still_labels(settings: Settings, split: SplitPaths, categories: Sequence[Category]) -> Labels:
    """Labelled images as videos of one frame, of which clips make pseudo-videos. Raises as `extract` does for them."""
    from extract.frames import require_files  # noqa: TID251
    from extract.pseudo import draw_pseudo_videos, pseudo_labels  # noqa: TID251

    drawn = draw_pseudo_videos(settings.pseudo, split.labels, categories)
    require_files((pseudo.still.file_name for pseudo in drawn), split.frames)
    whole = [replace(pseudo, transforms=(_unchanged(pseudo.still.height, pseudo.still.width),)) for pseudo in drawn]
    labels = pseudo_labels(whole, categories)
    pairs = zip(labels.videos, drawn, strict=True)
    return replace(labels, videos=tuple(replace(video, file_names=(p.still.file_name,)) for video, p in pairs))


def _unchanged(height: int, width: int) -> Transform:
    return Transform.resize((height, width), (height, width))
