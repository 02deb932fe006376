"""Tracks of a whole video from cached features (VITA §3.4; REFERENCE §5).

Shapes: T frames, Q frame queries, V video queries, C channels, K categories, R stored channels, H×W the
stored map, M decoded queries, N tracks, G (frame, query) pairs whose mask is not empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.masks import Rle, encode
from train_head.head import VitaHead
from train_head.mask_folding import MapDecoding
from train_head.points import STRIDE

_PIXELS_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class VideoTracks:
    """The N best tracks of a video, by class probability; a query may appear with several labels."""

    scores: tuple[float, ...]  # class probability × mask quality
    labels: tuple[int, ...]
    query_index: tuple[int, ...]
    mask_quality: tuple[float, ...]
    masks: tuple[tuple[Rle | None, ...], ...]  # per track and frame, at the original size; None = no pixel


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The N best (query, label) pairs, and the M distinct queries among them."""

    class_scores_N: Tensor
    labels_N: Tensor
    queries_M: Tensor  # distinct queries among the candidates
    row_N: Tensor  # each track's query, as an index into queries_M


@torch.no_grad()
def predict_video(
    head: VitaHead,
    frame_queries_TQC: Tensor,
    maps: Iterable[Tensor],
    *,
    decoding: MapDecoding,
    image_hw: tuple[int, int],
    original_hw: tuple[int, int],
    top_k: int,
    repeats: bool = True,
) -> VideoTracks:
    """Find the tracks of one video.

    `frame_queries_TQC` are the last detector layer's, normed. `maps` yields the stored map in consecutive
    chunks of frames (t, R, H, W), which are decoded and dropped one after another, so that only the run
    lengths grow with T. `image_hw` is the network's input without padding, `original_hw` that of the masks;
    the map has to cover the input (and one more row or column where it was padded).
    """
    outputs = head.predict(frame_queries_TQC)
    found = best_labels(outputs.class_logits_VK.float().softmax(dim=-1)[:, :-1], top_k, repeats)
    weights = head.fold_masks(outputs.mask_embed_VC[found.queries_M], decoding)
    decoder = MaskDecoder(len(found.queries_M), image_hw, original_hw, frame_queries_TQC.device)
    for map_tRHW in maps:
        decoder.add(weights.logits(map_tRHW))
    return assemble_tracks(found, decoder)


def assemble_tracks(found: Candidates, decoder: MaskDecoder) -> VideoTracks:
    """Put candidates and their decoded masks together."""
    quality_M = decoder.quality()
    rows = found.row_N.tolist()
    return VideoTracks(
        scores=tuple((found.class_scores_N * quality_M[found.row_N]).tolist()),
        labels=tuple(found.labels_N.tolist()),
        query_index=tuple(found.queries_M[found.row_N].tolist()),
        mask_quality=tuple(quality_M[found.row_N].tolist()),
        masks=tuple(tuple(decoder.masks[row]) for row in rows),
    )


def best_labels(probability_VK: Tensor, top_k: int, repeats: bool = True) -> Candidates:
    """Find the best (query, label) pairs of the V × K grid of class probabilities ("no object" left out).

    VITA: by default a query can be taken several times, as in the release; its masks are decoded once. Without
    `repeats` only its best label counts.
    """
    num_labels = probability_VK.shape[1]
    if not repeats:
        best_V, label_V = probability_VK.max(dim=1)
        scores_N, queries_N = best_V.topk(min(top_k, len(best_V)))
        rows_N = torch.arange(len(queries_N), device=queries_N.device)
        return Candidates(class_scores_N=scores_N, labels_N=label_V[queries_N], queries_M=queries_N, row_N=rows_N)
    scores_N, index_N = probability_VK.flatten().topk(min(top_k, probability_VK.numel()))
    queries_M, row_N = torch.unique(index_N // num_labels, return_inverse=True)
    return Candidates(class_scores_N=scores_N, labels_N=index_N % num_labels, queries_M=queries_M, row_N=row_N)


class MaskDecoder:
    """Turns chunks of logit maps into run lengths and sums what the mask quality needs."""

    def __init__(
        self, num_queries: int, image_hw: tuple[int, int], original_hw: tuple[int, int], device: torch.device
    ) -> None:
        self.image_hw, self.original_hw = image_hw, original_hw
        self.masks: list[list[Rle | None]] = [[] for _ in range(num_queries)]
        self._foreground_M = torch.zeros(num_queries, dtype=torch.float64, device=device)
        self._area_M = torch.zeros(num_queries, dtype=torch.float64, device=device)

    def quality(self) -> Tensor:
        """Mean foreground probability over the foreground pixels of all frames: (M), 0 for empty tracks."""
        return (self._foreground_M / (self._area_M + 1e-6)).float()

    def add(self, logits_tMHW: Tensor) -> None:
        """Take the next frames' stride-4 logits of all M queries.

        Bilinear values never exceed their neighbours: a map without a positive logit is an empty mask, and is
        neither up-sampled nor encoded.
        """
        first = len(self.masks[0])
        for track in self.masks:
            track.extend([None] * len(logits_tMHW))
        frame_G, query_G = (logits_tMHW.amax(dim=(-2, -1)) > 0).nonzero(as_tuple=True)
        if len(frame_G) == 0:
            return
        pixels = max(self.image_hw[0] * self.image_hw[1], self.original_hw[0] * self.original_hw[1])
        group = max(1, _PIXELS_AT_ONCE // pixels)
        for frames, queries in zip(torch.split(frame_G, group), torch.split(query_G, group), strict=True):
            masks_Gwh = self._upsample(logits_tMHW[frames, queries], queries)
            for frame, query, mask_wh in zip(frames.tolist(), queries.tolist(), masks_Gwh, strict=True):
                if mask_wh.any():
                    self.masks[query][first + frame] = encode(mask_wh.T)

    def _upsample(self, logits_GHW: Tensor, query_G: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Masks (G, w, h) at the original size, on the host; by columns, as run lengths want them."""
        H, W = logits_GHW.shape[-2:]
        logits_1Ghw = F.interpolate(logits_GHW[None], size=(H * STRIDE, W * STRIDE), mode="bilinear")
        logits_1Ghw = logits_1Ghw[..., : self.image_hw[0], : self.image_hw[1]]
        probability_Ghw = logits_1Ghw[0].sigmoid()
        certain_Ghw = probability_Ghw > 0.5
        foreground_G = (probability_Ghw * certain_Ghw).flatten(1).sum(dim=1)
        self._foreground_M.index_add_(0, query_G, foreground_G.double())
        self._area_M.index_add_(0, query_G, certain_Ghw.flatten(1).sum(dim=1).double())
        if self.original_hw != self.image_hw:
            logits_1Ghw = F.interpolate(logits_1Ghw, size=self.original_hw, mode="bilinear")
        return (logits_1Ghw[0] > 0).transpose(1, 2).contiguous().cpu().numpy()
