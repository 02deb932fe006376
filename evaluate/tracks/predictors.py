"""What finds the tracks of a cached video: the head of a run, or the training-free baseline.

Shapes: t frames of a block, Q frame queries, q of them kept, C channels, L detector layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cache.errors import ConfigError, some
from cache.labels.category_map import category_pairs
from cache.progress import warn_once
from cache.reader import CachedVideo
from configs.command import device_name
from configs.schema import CheckpointChoice, EvaluateSettings, FrameMatching, Settings
from configs.schema import Split as SplitName
from evaluate.tracks.baseline import track_without_training
from evaluate.tracks.inference import VideoTracks, predict_video
from evaluate.tracks.read_ahead import read_ahead
from train_head.build import decoding_of, map_channels
from train_head.checkpoint import BEST, CHECKPOINT, load_checkpoint
from train_head.data.video_sets import VideoSet
from train_head.heads.contract import TrackHead
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.frame_matches import label_map
from train_head.run_folder import SPLIT, read_train_ids

VideoPredictor = Callable[[CachedVideo], VideoTracks]


@dataclass(frozen=True, kw_only=True)
class HeadPredictor:
    """Whole-video inference by a trained head: a VideoPredictor."""

    head: TrackHead
    frozen: FrozenHeads
    decoding: MapDecoding
    choices: EvaluateSettings
    device: torch.device
    step: int
    """Of its training."""
    advance: Callable[[int], object] = lambda _: None
    """Told the number of frames of every block whose masks are decoded."""

    def __call__(self, cached: CachedVideo) -> VideoTracks:
        """The tracks of a video; memory does not grow with its length but for the run lengths."""
        frames = range(cached.attributes.num_frames)
        return predict_video(
            self.head,
            read_ahead(self.tokens(cached, frames)),
            read_ahead(self.maps(cached, frames)),
            num_frames=len(frames),
            decoding=self.decoding,
            image_hw=cached.attributes.image_hw,
            original_hw=cached.attributes.original_hw,
            top_k=self.choices.top_k,
            repeats=self.choices.repeats,
        )

    def tokens(self, cached: CachedVideo, frames: Sequence[int]) -> Iterator[TokenBlock]:
        """The frame queries that the head sees, in blocks of `evaluate.chunk_frames`."""
        for normed_tQC in normed_queries(cached, self.frozen, frames, self.choices.chunk_frames, self.device):
            yield prune_queries(self.frozen, normed_tQC, self.choices.keep_queries)

    def maps(self, cached: CachedVideo, frames: Sequence[int]) -> Iterator[Tensor]:
        """The maps (t, R, H, W) in the codec's space, in the same blocks."""
        for map_tRHW in expanded_maps(cached, frames, self.choices.chunk_frames, self.device, self.decoding):
            yield map_tRHW
            self.advance(len(map_tRHW))


def normed_queries(
    cached: CachedVideo, frozen: FrozenHeads, frames: Sequence[int], chunk_frames: int, device: torch.device
) -> Iterator[Tensor]:
    """The last detector layer's queries in blocks (t, Q, C), normed, read when they are needed."""
    for part in _blocks(frames, chunk_frames):
        yield frozen.normed(torch.from_numpy(cached.frame_queries(part)[:, -1]).to(device))


def expanded_maps(
    cached: CachedVideo, frames: Sequence[int], chunk_frames: int, device: torch.device, decoding: MapDecoding
) -> Iterator[Tensor]:
    """A video's maps in blocks (t, R, H, W), in the codec's space, read when they are needed."""
    for part in _blocks(frames, chunk_frames):
        stored_tRhw = torch.from_numpy(cached.mask_features(part)).to(device)
        yield decoding.expand(stored_tRhw, cached.attributes.map_hw)


def _blocks(frames: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (frames[start : start + size] for start in range(0, len(frames), size))


def prune_queries(frozen: FrozenHeads, normed_tQC: Tensor, share: float) -> TokenBlock:
    """Of every frame keep the `share` of queries that the detector is least sure are no object (VITA, Table 6)."""
    if share >= 1:
        return TokenBlock.whole_frames(normed_tQC)
    no_object_tQ = frozen.class_embed(normed_tQC).softmax(dim=-1)[..., -1]
    count = max(1, round(share * normed_tQC.shape[1]))
    slots_tq = no_object_tQ.topk(count, dim=1, largest=False).indices.sort(dim=1).values
    return TokenBlock(tokens_tqC=torch.take_along_dim(normed_tQC, slots_tq[..., None], dim=1), slots_tq=slots_tq)


def checkpoint_path(settings: Settings) -> Path:
    """The checkpoint of a run that is evaluated."""
    name = BEST if settings.evaluate.checkpoint is CheckpointChoice.best else CHECKPOINT
    return Path(settings.runs) / settings.name / name


def head_predictor(settings: Settings, videos: VideoSet) -> HeadPredictor:
    """The head in the run's checkpoint.

    Raises WeightsError where there is none, FingerprintMismatch for a cache of other features or categories,
    ConfigError where held-out videos were trained on.
    """
    device = torch.device(device_name(settings.device))
    path = checkpoint_path(settings)
    checkpoint = load_checkpoint(path)
    _require_unseen(path.parent, videos)
    if ignored := checkpoint.other_settings(settings.head):
        warn_once(f"a trained head keeps its settings, whatever these say: {', '.join(ignored)}")
    checkpoint.require_cache(videos.feature_cache, path, any_codec=True)
    checkpoint.require_categories([category.name for category in videos.labels.categories], path)
    heads = videos.feature_cache.heads
    return HeadPredictor(
        head=checkpoint.build_head(device),
        frozen=FrozenHeads(heads).to(device),
        decoding=decoding_of(videos.codec, map_channels(heads)).to(device),
        choices=settings.evaluate,
        device=device,
        step=checkpoint.step,
    )


def _require_unseen(run: Path, videos: VideoSet) -> None:
    """Raise ConfigError where the run trained on videos that these settings hold out."""
    if videos.split != SplitName.holdout.value:
        return
    if seen := sorted(set(read_train_ids(run) or ()).intersection(videos.video_ids)):
        raise ConfigError(
            f"{len(seen)} of {len(videos.video_ids)} videos to evaluate on were trained on: {some(seen)}",
            where=run / SPLIT,
            hint="use the data.holdout and data.holdout_seed of the training, or train anew with these",
        )


def known_categories(videos: VideoSet) -> list[tuple[int, int]]:
    """Pairs (class index of the labels, of the detector) of the categories that the detector knows."""
    return category_pairs(videos.labels.categories, videos.feature_cache.heads.category_names)


def baseline_predictor(settings: Settings, videos: VideoSet) -> VideoPredictor:
    """Training-free tracking; only categories that the detector knows can be found (`known_categories`)."""
    device = torch.device(device_name(settings.device))
    stored, categories = videos.feature_cache.heads, videos.labels.categories
    frozen, decoding = FrozenHeads(stored).to(device), decoding_of(videos.codec, map_channels(stored)).to(device)
    pairs = known_categories(videos)
    label_map_KJ = label_map(FrameMatching.category_map, len(categories), stored.num_classes, pairs).to(device)

    def predict(cached: CachedVideo) -> VideoTracks:
        frames, chunk = range(cached.attributes.num_frames), settings.evaluate.chunk_frames
        return track_without_training(
            frozen,
            lambda: read_ahead(normed_queries(cached, frozen, frames, chunk, device)),
            read_ahead(expanded_maps(cached, frames, chunk, device, decoding)),
            decoding=decoding,
            label_map_KJ=label_map_KJ,
            image_hw=cached.attributes.image_hw,
            original_hw=cached.attributes.original_hw,
            top_k=settings.evaluate.top_k,
            repeats=settings.evaluate.repeats,
        )

    return predict
