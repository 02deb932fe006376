"""One training step: clips in, gradients and loss terms out, in micro-batches.

Shapes: L detector layers, B clips, T frames, Q frame queries, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic

import torch
from torch import Tensor

from configs.schema import Settings
from train_head.build import build_criterion, point_config
from train_head.data.sources import AnyClip, ClipFeatures, FeatureSource
from train_head.distributed import Group
from train_head.heads.contract import HeadOutputs, TrackHead
from train_head.heads.mask_folding import MaskWeights
from train_head.losses.criterion import LossNormalisers, VitaLosses
from train_head.losses.frame_losses import frame_normalisers
from train_head.losses.host_copies import send
from train_head.losses.points import PointSource, RandomPoints
from train_head.losses.targets import ClipTargets


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """The total and the last decoder layer's unweighted terms, over the whole batch of all processes.

    frames: L_f, the weighted sum over the detector's prediction layers; 0 where the detector is frozen. Without a
    head, the terms are those of the detector's last layer.
    """

    loss: float
    class_loss: float
    mask: float
    dice: float
    similarity: float
    frames: float

    @classmethod
    def read(cls, terms: Tensor, gradient_norm: Tensor) -> StepLosses:
        """Copy a step's terms, in the order of the fields, from the device: the step's one wait for it.

        Raises FloatingPointError where one of them, or the norm of the gradients, is not finite.
        """
        *values, norm = torch.cat([terms, gradient_norm[None]]).tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError("the loss is not finite")
        if not math.isfinite(norm):
            raise FloatingPointError("the loss is finite, its gradients are not")
        loss, class_loss, mask, dice, similarity, frames = values
        return cls(loss=loss, class_loss=class_loss, mask=mask, dice=dice, similarity=similarity, frames=frames)


@dataclass(frozen=True, kw_only=True)
class BatchNormalisers:
    """What the losses of a whole batch are divided by: those of the clips, and those of their single frames."""

    clips: LossNormalisers
    frames: LossNormalisers


class TrainingStep(Generic[AnyClip]):
    """Computes gradients of the head, and of the detector where it is trained; holds what never changes."""

    def __init__(
        self,
        settings: Settings,
        source: FeatureSource[AnyClip],
        device: torch.device,
        group: Group,
        autocast: bool,
    ) -> None:
        self.settings, self.source, self.device = settings, source, device
        self.group, self.autocast = group, autocast
        self.criterion = build_criterion(settings.loss, device, torch.bfloat16 if autocast else torch.float32)
        self.points = point_config(settings.loss)

    def gradients(self, head: TrackHead, clips: Sequence[AnyClip]) -> Tensor:
        """Add this process's share of the batch's gradients, those of `clips`.

        Returns the whole batch's losses for `StepLosses.read`. Raises FloatingPointError where a cost is not finite.
        """
        targets = [self.source.targets(clip) for clip in clips]
        normalisers = self.normalisers(targets)
        terms = torch.zeros(len(fields(StepLosses)), device=self.device)
        size = len(clips) // self.settings.train.accumulate
        for start in range(0, len(clips), size):
            part = slice(start, start + size)
            terms += self._backward(head, clips[part], targets[part], normalisers)
        return self.group.sum(terms)

    def _backward(
        self,
        head: TrackHead,
        clips: Sequence[AnyClip],
        targets: Sequence[ClipTargets],
        normalisers: BatchNormalisers,
    ) -> Tensor:
        """Add the gradients of some clips; returns their terms, in the order of `StepLosses`."""
        features = self.source.features(clips, targets, normalisers.frames)
        frames = torch.zeros((), device=self.device)
        if features.frame_losses is not None:
            frames = self.settings.loss.frame_weight * features.frame_losses.total
        if self.source.trains_head:
            losses = self.head_losses(head, clips, features, normalisers.clips)
            total = losses.total + frames
        else:
            assert features.frame_losses is not None
            losses, total = features.frame_losses, frames
        total.backward()  # type: ignore[no-untyped-call]
        shown = (total, losses.class_D[-1], losses.mask_D[-1], losses.dice_D[-1], losses.similarity, frames)
        return torch.stack(shown).detach()

    def head_losses(
        self,
        head: TrackHead,
        clips: Sequence[AnyClip],
        features: ClipFeatures,
        normalisers: LossNormalisers,
    ) -> VitaLosses:
        """Forward and losses of the head (L_v and L_sim), divided by the whole batch's normalisers."""
        outputs, mask_weights = self.forward(head, features)
        points = self.point_sources(clips)
        return self.criterion(outputs, mask_weights, features.maps, features.targets, points, normalisers)

    def forward(self, head: TrackHead, features: ClipFeatures) -> tuple[HeadOutputs, MaskWeights]:
        """What the head says about some clips, and its mask embeddings folded into the codec's space."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            outputs = head(features.frame_queries_LBTQC)
            return outputs, head.fold_masks(outputs.mask_embed_DLBVC, self.source.decoding)

    def point_sources(self, clips: Sequence[AnyClip]) -> list[PointSource]:
        """Where the losses of each clip take their points from."""
        seed = self.settings.seed
        return [RandomPoints.for_clip(self.points, seed, clip.index, self.device) for clip in clips]

    def normalisers(self, targets: Sequence[ClipTargets]) -> BatchNormalisers:
        """What the losses of the whole batch, of all processes, are divided by; `targets` are this process's."""
        settings = self.settings
        assert targets[0].frame_queries_LTN is not None
        num_layers, no_object = len(targets[0].frame_queries_LTN), settings.loss.no_object_weight
        clips = LossNormalisers.of_batch(targets, num_layers, settings.head.num_queries, no_object)
        frames = frame_normalisers(targets, self.source.sizes.num_queries, no_object)
        (own_23,) = send([torch.stack([clips.stacked(), frames.stacked()]).numpy()], self.device)
        summed_23 = self.group.sum(own_23)
        return BatchNormalisers(
            clips=LossNormalisers.from_stacked(summed_23[0]), frames=LossNormalisers.from_stacked(summed_23[1])
        )
