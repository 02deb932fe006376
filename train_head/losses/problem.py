"""What the losses of a batch are computed from, and the sums that both forms of them arrive at.

`clip_losses` goes clip by clip and frame by frame, so that little exists at a time: a CPU's cache is what counts there.
`batch_losses` takes all clips at once, in as few operations as a single clip: on a GPU every one costs a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import PaddedArea
from train_head.heads.contract import HeadOutputs
from train_head.heads.mask_folding import MaskWeights
from train_head.losses.matcher import ClipMatch, CostWeights
from train_head.losses.points import PointSource
from train_head.losses.targets import ClipTargets


@dataclass(frozen=True, kw_only=True)
class LossProblem:
    """B clips, what the head says about them, and how it is judged."""

    outputs: HeadOutputs
    mask_weights: MaskWeights  # the folded `mask_embed_DLBVC`
    maps: Sequence[Tensor]  # B of (T, R, H, W), of any sizes
    targets: Sequence[ClipTargets]
    points: Sequence[PointSource]
    cost_weights: CostWeights
    padded_area: PaddedArea
    logit_type: torch.dtype  # of the mask logits that the matching alone sees
    absent_frames: bool

    @property
    def has_similarity(self) -> bool:
        """Whether the head has embeddings for the similarity loss."""
        return self.outputs.frame_similarity_LBTQC is not None and self.outputs.clip_similarity_LBVC is not None


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over all clips, not divided by anything yet; the sum of the class loss follows from the matches."""

    matches: tuple[ClipMatch, ...]
    mask_D: Tensor
    dice_D: Tensor
    similarity: Tensor | None
