"""One training step: clips in, summed gradients and loss terms out, in micro-batches and over processes.

Shapes: L detector layers, B clips, T frames, Q frame queries, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from configs.schema import Settings
from train_head.build import build_criterion, decoding_of, map_channels, point_config
from train_head.clips import Clip
from train_head.criterion import LossNormalisers, VitaLosses
from train_head.data import VideoSet
from train_head.detector_predictions import FrozenHeads
from train_head.distributed import Group
from train_head.frame_memory import build_frame_memory
from train_head.head import HeadOutputs, VitaHead
from train_head.mask_folding import MaskWeights
from train_head.points import PointSource, RandomPoints
from train_head.targets import ClipTargets


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """The total and the last decoder layer's unweighted terms, over the whole batch of all processes."""

    loss: float
    class_loss: float
    mask: float
    dice: float
    similarity: float


class TrainingStep:
    """Computes gradients of the head; holds what never changes: frozen heads, codec, matched frames, criterion."""

    def __init__(
        self, settings: Settings, videos: VideoSet, device: torch.device, group: Group, autocast: bool
    ) -> None:
        self.settings, self.device, self.group, self.autocast = settings, device, group, autocast
        heads = videos.feature_cache.heads
        self.decoding = decoding_of(videos.codec, map_channels(heads)).to(device)
        self.detector_heads = FrozenHeads(heads).to(device)
        self.frame_memory = build_frame_memory(settings, videos, self.detector_heads, self.decoding)
        self.criterion = build_criterion(settings.loss)
        chosen = settings.train.num_layers
        self.layers = slice(None if chosen is None else -chosen, None)
        self.points = point_config(settings.loss)

    def gradients(self, head: VitaHead, clips: Sequence[Clip]) -> StepLosses:
        """Leave the gradients of the whole batch in `head`; `clips` are this process's share of it.

        Raises FloatingPointError where a cost or a loss is not finite.
        """
        targets = [self._targets(clip) for clip in clips]
        normalisers = self._normalisers(targets)
        terms = torch.zeros(len(fields(StepLosses)), device=self.device)
        size = len(clips) // self.settings.train.accumulate
        for start in range(0, len(clips), size):
            part = slice(start, start + size)
            losses = self.losses(head, clips[part], targets[part], normalisers)
            losses.total.backward()  # type: ignore[no-untyped-call]
            terms += _terms(losses)
        self.group.sum_gradients(head.parameters())
        summed = self.group.sum(terms)
        if not bool(summed.isfinite().all()):
            raise FloatingPointError("the loss is not finite")
        loss, class_loss, mask, dice, similarity = summed.tolist()
        return StepLosses(loss=loss, class_loss=class_loss, mask=mask, dice=dice, similarity=similarity)

    def losses(
        self,
        head: VitaHead,
        clips: Sequence[Clip],
        targets: Sequence[ClipTargets],
        normalisers: LossNormalisers,
    ) -> VitaLosses:
        """Forward and losses of some clips, divided by the whole batch's normalisers."""
        maps = [clip.map_TRHW.to(self.device, non_blocking=True) for clip in clips]
        outputs, mask_weights = self.forward(head, clips)
        return self.criterion(outputs, mask_weights, maps, targets, self.point_sources(clips), normalisers)

    def forward(self, head: VitaHead, clips: Sequence[Clip]) -> tuple[HeadOutputs, MaskWeights]:
        """What the head says about some clips, and its mask embeddings folded into the codec's space."""
        queries = torch.stack([clip.frame_queries_TLQC for clip in clips]).to(self.device, non_blocking=True)
        queries_LBTQC = self.detector_heads.normed(queries[:, :, self.layers]).permute(2, 0, 1, 3, 4)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            outputs = head(queries_LBTQC, shift=self.settings.head.shift_in_training)
            return outputs, head.fold_masks(outputs.mask_embed_DLBVC, self.decoding)

    def point_sources(self, clips: Sequence[Clip]) -> list[PointSource]:
        """Where the losses of each clip take their points from."""
        seed = self.settings.seed
        return [RandomPoints.for_clip(self.points, seed, clip.index, self.device) for clip in clips]

    def _targets(self, clip: Clip) -> ClipTargets:
        """Move the clip's targets to the device, with the frame matches of the layers that are trained on."""
        targets = self.frame_memory.with_matches(clip, clip.targets.to(self.device))
        assert targets.frame_queries_LTN is not None
        return replace(targets, frame_queries_LTN=targets.frame_queries_LTN[self.layers])

    def _normalisers(self, targets: Sequence[ClipTargets]) -> LossNormalisers:
        settings = self.settings
        assert targets[0].frame_queries_LTN is not None
        num_layers = len(targets[0].frame_queries_LTN)
        own = LossNormalisers.of_batch(targets, num_layers, settings.head.num_queries, settings.loss.no_object_weight)
        return LossNormalisers.from_stacked(self.group.sum(own.stacked()))


def _terms(losses: VitaLosses) -> Tensor:
    last = (losses.class_D[-1], losses.mask_D[-1], losses.dice_D[-1], losses.similarity)
    return torch.stack([losses.total, *last]).detach()
