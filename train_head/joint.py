"""Fine-tuning: the trainer's features come from a detector that is trained along, on augmented images.

The one place where training runs stage one's detector (the benchmark runs it to compare); everything of `extract` is
imported when it is needed.

Shapes: D prediction layers, L of them that the head takes, B clips, T frames, F = B·T, Q frame queries, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cache.codecs.float16 import Float16
from cache.errors import AnnotationError, ConfigError
from cache.fingerprint import Fingerprint
from cache.labels.category_map import category_pairs
from cache.labels.tracks import Labels
from cache.layout import cropped_map_hw
from cache.progress import is_main
from configs.cards import write_detector_card, write_run_card
from configs.command import precision_name
from configs.schema import DetectorEngine, Settings
from configs.splits import train_split
from train_head.build import FeatureSizes, TrainedPart, build_criterion, point_config
from train_head.checkpoint import Checkpoint
from train_head.data.image_sets import open_live_clips
from train_head.data.live_clips import LiveClip, LiveClips
from train_head.data.sources import ClipFeatures
from train_head.data.upload import Copy
from train_head.data.video_sets import chosen_videos
from train_head.draws import StepDraw
from train_head.heads.contract import HeadOutputs
from train_head.heads.mask_folding import MapDecoding, fold_mask_embeddings
from train_head.losses.criterion import LossNormalisers, VitaLosses
from train_head.losses.frame_losses import expected_matches, frame_losses, with_frame_matches
from train_head.losses.points import RandomPoints
from train_head.losses.targets import ClipTargets
from train_head.trainer import run_training

if TYPE_CHECKING:
    from extract.detector.trainable import LayerPredictions, TrainableDetector  # noqa: TID251

DETECTOR = "detector"  # the folder of a run that `extract` reads as detector.weights


def finetune(settings: Settings) -> Path:
    """Train head and detector together, or the detector alone; returns the run's folder.

    The run's `detector/` is written at its end. Raises VitaCacheError as `train`, and for unreadable frames.
    """
    if settings.train.evaluate_every or settings.train.ema:
        raise ConfigError(
            "train.evaluate_every and train.ema are of the head alone",
            hint="set them to 0; after fine-tuning, extract with the run's detector, then evaluate",
        )
    if settings.train.mix:
        raise ConfigError("train.mix mixes caches, which fine-tuning does not read", hint="set train.mix=[]")
    return run_training(settings, lambda device: LiveSource(settings, device))


class LiveSource:
    """Features of a detector that is trained along, with its own losses on single frames."""

    def __init__(self, settings: Settings, device: torch.device, *, augment: bool = True) -> None:
        """`augment=False` gives clips of the frames that a cache holds, in its size.

        Raises VitaCacheError for unreadable labels or weights, missing frames, or a detector of another engine.
        """
        from extract.frames import require_frames  # noqa: TID251

        self.settings, self.device, self.augment = settings, device, augment
        self.trains_head = not settings.finetune.frames_only
        paths = train_split(settings)
        self.labels, self.holdout = chosen_videos(settings, "train", paths.read_labels())
        require_frames(self.labels.videos, paths.frames)
        self.decoding = MapDecoding()
        self.detector = _load(settings, self.labels, device)
        self.parts: Sequence[TrainedPart] = _parts(self.detector, settings)
        self.sizes = _sizes(self.detector, self.labels)
        self.criterion, self.points = build_criterion(settings.loss, device), point_config(settings.loss)
        self.num_layers = settings.train.num_layers or settings.detector.num_layers
        self.fingerprint = _fingerprint(settings, self.detector, device)

    def clips(self) -> LiveClips:
        """Clips of the training videos and of pseudo-videos; single frames where the detector is trained alone."""
        num_frames = None if self.trains_head else 1
        return open_live_clips(self.settings, self.labels, num_frames=num_frames, augment=self.augment)

    def place(self, clip: LiveClip, copy: Copy) -> LiveClip:
        """Copy the clip's images and labels."""
        return clip.placed(copy)

    def targets(self, clip: LiveClip) -> ClipTargets:
        """Return the clip's targets; of the frame matches only the number is known yet."""
        targets = clip.targets
        return replace(targets, frame_queries_LTN=expected_matches(targets, self.num_layers, self.sizes.num_queries))

    def features(
        self, clips: Sequence[LiveClip], targets: Sequence[ClipTargets], frame_normalisers: LossNormalisers
    ) -> ClipFeatures:
        """Run the detector on the clips, and match and score its predictions on every frame (L_f)."""
        predictions = self._predictions(clips)
        maps = [
            _unpadded(prediction.mask_features_BFHW, target.image_hw)
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        losses = self._frame_losses(clips, predictions, maps, targets, frame_normalisers)
        return ClipFeatures(
            frame_queries_LBTQC=torch.stack([p.frame_queries_DBQC[-self.num_layers :] for p in predictions], dim=1),
            maps=maps,
            targets=with_frame_matches(targets, losses.matches, self.num_layers),
            frame_losses=losses,
        )

    def _predictions(self, clips: Sequence[LiveClip]) -> list[LayerPredictions]:
        """What the detector says of each clip; clips of one size go through it together."""
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for position, clip in enumerate(clips):
            groups[clip.images_T3HW.shape].append(position)
        found: dict[int, LayerPredictions] = {}
        for positions in groups.values():
            images_FCHW = torch.cat([clips[position].images_T3HW for position in positions])
            devices = [self.device] if self.device.type == "cuda" else []
            # Stochastic depth (Swin) draws from the global generators, for all frames that go through together: other
            # micro-batches, or another number of processes, drop other paths.
            with torch.random.fork_rng(devices):
                entropy = [self.settings.seed, clips[positions[0]].index, StepDraw.dropped_paths]
                torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                together = self.detector(images_FCHW)
            found.update(zip(positions, together.split(len(images_FCHW) // len(positions)), strict=True))
        return [found[position] for position in range(len(clips))]

    def _frame_losses(
        self,
        clips: Sequence[LiveClip],
        predictions: Sequence[LayerPredictions],
        maps: Sequence[Tensor],
        targets: Sequence[ClipTargets],
        normalisers: LossNormalisers,
    ) -> VitaLosses:
        convolution = self.detector.mask_convolution
        assert convolution.bias is not None
        mask_embed_D1FQE = torch.cat([p.mask_embed_DBQE for p in predictions], dim=1)[:, None]
        outputs = HeadOutputs(
            class_logits_DLBVK=torch.cat([p.class_logits_DBQK for p in predictions], dim=1)[:, None],
            mask_embed_DLBVC=mask_embed_D1FQE,
            video_queries_DLBVC=torch.cat([p.frame_queries_DBQC for p in predictions], dim=1)[:, None],
            clip_similarity_LBVC=None,
            frame_similarity_LBTQC=None,
        )
        folded = fold_mask_embeddings(mask_embed_D1FQE, convolution.weight.flatten(1), convolution.bias, self.decoding)
        seed, draw = self.settings.seed, StepDraw.frame_points
        points = [RandomPoints.for_clip(self.points, seed, clip.index, self.device, draw) for clip in clips]
        return frame_losses(self.criterion, outputs, folded, maps, targets, points, normalisers)

    def state(self) -> dict[str, Tensor]:
        """The detector under its official names."""
        return self.detector.official_state()

    def resume(self, checkpoint: Checkpoint, where: Path) -> None:
        """Take up the detector again; refuses a run that trained a head alone."""
        if not checkpoint.detector:
            raise ConfigError("this run trained a head from a cache", where=where, hint="choose another name=...")
        self.detector.load_official_state(checkpoint.detector)

    def finish(self, folder: Path) -> str:
        """Export the detector; from here on the fingerprint is that of a cache which it fills."""
        from extract.detector.checkpoints import weights_sha256  # noqa: TID251

        self.detector.save(folder / DETECTOR)
        write_detector_card(folder / DETECTOR, self.settings)
        write_run_card(folder, self.settings)
        self.fingerprint = replace(self.fingerprint, weights_sha256=weights_sha256(folder / DETECTOR))
        return f"the detector: `make extract detector.weights={folder / DETECTOR} cache.path=...` reads it\n"


def _load(settings: Settings, labels: Labels, device: torch.device) -> TrainableDetector:
    from extract.detector.loading import load_model  # noqa: TID251
    from extract.detector.trainable import TrainableDetector, with_classes  # noqa: TID251

    chosen = settings.detector
    if chosen.engine is not DetectorEngine.transformers:
        hint = "detector.engine=transformers reads official .pkl and .pth files too"
        raise ConfigError("fine-tuning runs in the transformers engine alone", got=chosen.engine.value, hint=hint)
    if not labels.has_tracks:
        raise AnnotationError("the train split has no annotations", where=train_split(settings).labels)
    loaded = load_model(Path(chosen.weights), architecture=chosen.architecture)
    pairs = category_pairs(labels.categories, loaded.category_names)
    model = with_classes(loaded.model, [category.name for category in labels.categories], pairs, settings.seed)
    if is_main():
        print(f"{loaded.report}; {len(pairs)} of {len(labels.categories)} categories start from the detector's own")
    detector = TrainableDetector(model, precision=precision_name(settings.train.precision, device.type))
    return detector.to(device)


def _parts(detector: TrainableDetector, settings: Settings) -> tuple[TrainedPart, TrainedPart]:
    rate = settings.finetune.detector_rate
    return (
        TrainedPart(module=detector.rest, rate_factor=rate),
        TrainedPart(module=detector.backbone, rate_factor=rate * settings.finetune.backbone_rate),
    )


def _sizes(detector: TrainableDetector, labels: Labels) -> FeatureSizes:
    config = detector.model.config
    return FeatureSizes(
        num_classes=len(labels.categories),
        num_queries=config.num_queries,
        hidden_dim=config.hidden_dim,
        map_channels=config.feature_size,
    )


def _fingerprint(settings: Settings, detector: TrainableDetector, device: torch.device) -> Fingerprint:
    """What `extract` will compose on this device for a float16 cache of the detector, once that is exported."""
    from extract.fingerprint import composed_fingerprint  # noqa: TID251

    precision = precision_name(settings.detector.precision, device.type) if device.type == "cuda" else "float32"
    architecture = detector.architecture
    return composed_fingerprint(settings, "not exported yet", Float16(), architecture=architecture, precision=precision)


def _unpadded(map_BFHW: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Cut a map as the cache stores it."""
    height, width = cropped_map_hw((map_BFHW.shape[-2], map_BFHW.shape[-1]), image_hw)
    return map_BFHW[..., :height, :width]
