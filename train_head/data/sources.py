"""Where a training step's features come from: the cache, or a detector that is trained along (joint.py).

Shapes: L detector layers, B clips, T frames, Q frame queries, C channels, R stored channels, H×W the stride-4 map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cache.fingerprint import Fingerprint
from cache.labels.splits import Split
from cache.labels.tracks import Labels
from configs.schema import Settings
from train_head.build import FeatureSizes, TrainedPart, decoding_of, feature_sizes
from train_head.checkpoint import Checkpoint
from train_head.data.clip_loader import ClipReader
from train_head.data.clips import Clip, ClipConfig, ClipDataset, ClipStream
from train_head.data.frame_memory import build_frame_memory
from train_head.data.upload import Copy
from train_head.data.video_sets import VideoSet
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.criterion import LossNormalisers, VitaLosses
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.targets import ClipTargets


class SampledClip(Protocol):
    """What the trainer knows of a clip, whatever it holds: its number, where it is from, its objects."""

    @property
    def index(self) -> int:
        """Number in the endless stream of clips."""
        ...

    @property
    def name(self) -> str:
        """Its video, for people."""
        ...

    @property
    def frames(self) -> tuple[int, ...]:
        """Its frames, ascending."""
        ...

    @property
    def targets(self) -> ClipTargets:
        """Its objects, without frame matches."""
        ...


AnyClip = TypeVar("AnyClip", bound=SampledClip)


@dataclass(frozen=True, kw_only=True)
class ClipFeatures:
    """What the head and the losses need of B clips, on the computing device."""

    frame_queries_LBTQC: Tensor  # after the detector's decoder_norm
    maps: Sequence[Tensor]  # B of (T, R, H, W), in the codec's space
    targets: Sequence[ClipTargets]  # with frame matches
    frame_losses: VitaLosses | None = None  # of a detector that is trained along


class FeatureSource(Protocol[AnyClip]):
    """Clips with labels, and the features of their frames.

    fingerprint: of a cache with these features. parts: what is trained beside the head. trains_head: whether the
    head is trained at all.
    """

    labels: Labels
    holdout: Split
    sizes: FeatureSizes
    decoding: MapDecoding
    fingerprint: Fingerprint
    parts: Sequence[TrainedPart]
    trains_head: bool

    def clips(self) -> ClipReader[AnyClip]:
        """Clip i of the endless stream, a function of (seed, i) alone."""
        ...

    def place(self, clip: AnyClip, copy: Copy) -> AnyClip:
        """Copy what a step needs of a clip to the computing device."""
        ...

    def targets(self, clip: AnyClip) -> ClipTargets:
        """Return a placed clip's targets, with as many frame matches as its features will have."""
        ...

    def features(
        self, clips: Sequence[AnyClip], targets: Sequence[ClipTargets], frame_normalisers: LossNormalisers
    ) -> ClipFeatures:
        """Features of some clips, placed; `frame_normalisers` are the whole batch's, for the detector's losses."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold of `parts`: the detector under its official names."""
        ...

    def resume(self, checkpoint: Checkpoint, where: Path) -> None:
        """Take up `state` again; raises VitaCacheError where the run had another source."""
        ...

    def finish(self, folder: Path) -> str:
        """Write to the run's folder what other stages need of `parts`, and say what; `fingerprint` then holds."""
        ...


def clip_stream(
    settings: Settings,
    labels: Sequence[Labels],
    ratios: Sequence[float],
    places: Iterable[object],
    *,
    num_frames: int | None = None,
) -> ClipStream:
    """Clips of the labels' videos as the settings draw them; `num_frames` None takes `train.num_frames`."""
    train = settings.train
    config = ClipConfig(
        num_frames=num_frames or train.num_frames,
        frame_range=train.frame_range,
        seed=settings.seed,
        replacement=train.replacement,
    )
    return ClipStream(labels, ratios, config, places)


class CachedSource:
    """Features of the frozen detector, from the cache."""

    parts: Sequence[TrainedPart] = ()
    trains_head = True

    def __init__(self, settings: Settings, videos: VideoSet, device: torch.device) -> None:
        self.settings, self.videos, self.device = settings, videos, device
        self.labels, self.holdout = videos.labels, videos.holdout
        self.fingerprint = videos.feature_cache.fingerprint
        self.sizes = feature_sizes(videos.feature_cache, videos.labels)
        self.decoding = decoding_of(videos.codec, self.sizes.map_channels).to(device)
        self.heads = FrozenHeads(videos.feature_cache.heads).to(device)
        self.frame_memory = build_frame_memory(settings, videos, self.heads, self.decoding)
        chosen = settings.train.num_layers
        self.layers = slice(None if chosen is None else -chosen, None)

    def clips(self) -> ClipDataset:
        """Clips of the training videos. Raises VitaCacheError where the caches lack any that the settings ask for."""
        sources = self.videos.sources
        labels, ratios = [source.labels for source in sources], [source.ratio for source in sources]
        places = [source.feature_cache.path for source in sources]
        return ClipDataset(sources, clip_stream(self.settings, labels, ratios, places))

    def place(self, clip: Clip, copy: Copy) -> Clip:
        """Copy the clip, as it is stored, with the layers that are trained on."""
        return clip.placed(copy, self.layers)

    def targets(self, clip: Clip) -> ClipTargets:
        """Return the clip's targets with their frame matches."""
        return self.frame_memory.with_matches(clip)

    def features(
        self, clips: Sequence[Clip], targets: Sequence[ClipTargets], frame_normalisers: LossNormalisers
    ) -> ClipFeatures:
        """Normalise the stored queries; maps stay in the codec's space, blocks of them become pixels."""
        queries_BTLQC = torch.stack([clip.frame_queries_TLQC for clip in clips])
        return ClipFeatures(
            frame_queries_LBTQC=self.heads.normed(queries_BTLQC).permute(2, 0, 1, 3, 4),
            maps=[self.decoding.expand(clip.map_TRHW, clip.map_hw) for clip in clips],
            targets=targets,
        )

    def state(self) -> dict[str, Tensor]:
        """Nothing: the detector is frozen."""
        return {}

    def resume(self, checkpoint: Checkpoint, where: Path) -> None:
        """Refuse a checkpoint that was trained on other features."""
        checkpoint.require_cache(self.videos.feature_cache, where)

    def finish(self, folder: Path) -> str:
        """Nothing: the cache holds everything."""
        return ""
