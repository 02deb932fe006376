"""Logit maps become masks at the original size, run-length encoded, and mask qualities, as in VITA's release.

Shapes: t frames of a block, M queries, H×W the stride-4 map, G (frame, query) pairs whose mask is not empty,
w×h a mask, column by column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cache.labels.masks import encode_columns
from evaluate.tracks.mask_store import MaskStore, StoredMasks
from evaluate.tracks.read_ahead import read_ahead
from train_head.losses.points import STRIDE

_PIXELS_AT_ONCE = 1 << 22  # few enough to stay in a processor's cache


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """Masks of G (frame, query) pairs on the host; frames count from the video's first."""

    frames: list[int]
    queries: list[int]
    masks_Gwh: NDArray[np.bool_]


class MaskDecoder:
    """Turns blocks of logit maps into run lengths and sums what the mask quality needs."""

    def __init__(
        self, num_queries: int, image_hw: tuple[int, int], original_hw: tuple[int, int], device: torch.device
    ) -> None:
        self.image_hw, self.original_hw = image_hw, original_hw
        self.store = MaskStore(num_queries, original_hw)
        self.foreground_M = torch.zeros(num_queries, dtype=torch.float64, device=device)  # summed probability
        self.area_M = torch.zeros(num_queries, dtype=torch.float64, device=device)  # pixels

    def quality(self) -> Tensor:
        """Mean foreground probability over the foreground pixels of all frames: (M), 0 for empty tracks."""
        return (self.foreground_M / (self.area_M + 1e-6)).float()

    def masks(self, query: int) -> StoredMasks:
        """The masks of one query in all frames so far."""
        return StoredMasks(self.store, query)

    def decode(self, logits: Iterable[Tensor]) -> None:
        """Take the next frames' stride-4 logits of all queries, (t, M, H, W) each.

        They are made, and up-sampled, in a thread of their own while the masks before are encoded here.
        """
        for found in read_ahead(self._foreground(logits)):
            for frame, query, counts in zip(found.frames, found.queries, encode_columns(found.masks_Gwh), strict=True):
                self.store.put(frame, query, counts)

    @torch.no_grad()
    def _foreground(self, logits: Iterable[Tensor]) -> Iterator[_Masks]:
        """The masks that have a pixel.

        Bilinear values never exceed their neighbours: a map without a positive logit is an empty mask, and is
        neither up-sampled nor encoded.
        """
        pixels = max(self.image_hw[0] * self.image_hw[1], self.original_hw[0] * self.original_hw[1])
        group = max(1, _PIXELS_AT_ONCE // pixels)
        for logits_tMHW in logits:
            first = self.store.num_frames
            self.store.add_frames(len(logits_tMHW))
            frame_G, query_G = (logits_tMHW.amax(dim=(-2, -1)) > 0).nonzero(as_tuple=True)
            for frames, queries in zip(torch.split(frame_G, group), torch.split(query_G, group), strict=True):
                if len(frames):
                    masks_Gwh = self._upsample(logits_tMHW[frames, queries], queries)
                    present_G = masks_Gwh.flatten(1).any(dim=1)
                    yield _Masks(
                        frames=(frames[present_G] + first).tolist(),
                        queries=queries[present_G].tolist(),
                        masks_Gwh=masks_Gwh[present_G].cpu().numpy(),
                    )

    def _upsample(self, logits_GHW: Tensor, query_G: Tensor) -> Tensor:
        """Masks (G, w, h) at the original size; by columns, as run lengths want them."""
        H, W = logits_GHW.shape[-2:]
        logits_1Ghw = F.interpolate(logits_GHW[None], size=(H * STRIDE, W * STRIDE), mode="bilinear")
        logits_1Ghw = logits_1Ghw[..., : self.image_hw[0], : self.image_hw[1]]
        probability_Ghw = logits_1Ghw[0].sigmoid()
        certain_Ghw = probability_Ghw > 0.5
        foreground_G = (probability_Ghw * certain_Ghw).flatten(1).sum(dim=1)
        self.foreground_M.index_add_(0, query_G, foreground_G.double())
        self.area_M.index_add_(0, query_G, certain_Ghw.flatten(1).sum(dim=1).double())
        if self.original_hw != self.image_hw:
            logits_1Ghw = F.interpolate(logits_1Ghw, size=self.original_hw, mode="bilinear")
        return (logits_1Ghw[0] > 0).transpose(1, 2).contiguous()
