"""Tracks of a whole video from cached features (VITA §3.4; scores and masks as in the release).

Shapes: T frames, Q frame queries, V video queries, C channels, K categories, R stored channels, H×W the
stored map, M decoded queries, N tracks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.labels.masks import Rle
from evaluate.tracks.mask_decoding import MaskDecoder
from train_head.heads.contract import TrackHead
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.mask_folding import MapDecoding


@dataclass(frozen=True, kw_only=True)
class VideoTracks:
    """The N best tracks of a video, by class probability; a query may appear with several labels."""

    scores: tuple[float, ...]  # class probability × mask quality
    labels: tuple[int, ...]
    query_index: tuple[int, ...]
    mask_quality: tuple[float, ...]
    masks: tuple[Sequence[Rle | None], ...]  # per track and frame, at the original size; None = no pixel


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The N best (query, label) pairs, and the M distinct queries among them."""

    class_scores_N: Tensor
    labels_N: Tensor
    queries_M: Tensor  # distinct queries among the candidates
    row_N: Tensor  # each track's query, as an index into queries_M


@torch.no_grad()
def predict_video(
    head: TrackHead,
    blocks: Iterable[TokenBlock],
    maps: Iterable[Tensor],
    *,
    num_frames: int,
    decoding: MapDecoding,
    image_hw: tuple[int, int],
    original_hw: tuple[int, int],
    top_k: int,
    repeats: bool = True,
) -> VideoTracks:
    """Find the tracks of one video of any length.

    `blocks` yields the last detector layer's frame queries, normed, in consecutive blocks of frames. Then `maps`
    yields the stored map, (t, R, H, W) each; the sizes of the blocks do not matter. Both are dropped one after
    another, so that only the run lengths grow with T. `image_hw` is the network's input without padding,
    `original_hw` that of the masks; the map has to cover the input (and one more row or column where it was padded).
    """
    outputs = head.predict_stream(blocks, num_frames)
    found = best_labels(outputs.class_logits_VK.float().softmax(dim=-1)[:, :-1], top_k, repeats)
    weights = head.fold_masks(outputs.mask_embed_VC[found.queries_M], decoding)
    decoder = MaskDecoder(len(found.queries_M), image_hw, original_hw, outputs.mask_embed_VC.device)
    decoder.decode(weights.logits(map_tRHW) for map_tRHW in maps)
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
        masks=tuple(decoder.masks(row) for row in rows),
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
