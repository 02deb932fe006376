"""The training-free baseline: the frozen detector's own queries, followed from frame to frame, as in MinVIS.

Huang, Yu and Anandkumar, "MinVIS: A Minimal Video Instance Segmentation Framework without Video-based Training",
NeurIPS 2022. Shapes: t frames of a block, Q frame queries, C channels, M decoded queries, K categories of the labels,
J categories of the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from evaluate.tracks.inference import VideoTracks, assemble_tracks, best_labels
from evaluate.tracks.mask_decoding import MaskDecoder
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.detector_predictions import FrozenHeads


def follow_queries(normed_tQC: Tensor, before_QC: Tensor | None = None) -> Tensor:
    """Match the queries of consecutive frames by cosine similarity (Hungarian).

    Returns (t, Q) int64: entry (t, q) is the query of frame t that continues query q of `before_QC`, which stand for
    the frame before the block, or of the block's first frame where there is none.
    """
    unit_tQC = F.normalize(normed_tQC.float(), dim=-1)
    last_QC = unit_tQC[0] if before_QC is None else F.normalize(before_QC.float(), dim=-1)
    orders = [torch.arange(len(last_QC))] if before_QC is None else []
    for now_QC in unit_tQC[len(orders) :]:
        similarity_QQ = last_QC @ now_QC.t()
        orders.append(torch.from_numpy(linear_sum_assignment(similarity_QQ.cpu().numpy(), maximize=True)[1]))
        last_QC = now_QC[orders[-1]]
    return torch.stack(orders)


@torch.no_grad()
def track_without_training(
    heads: FrozenHeads,
    blocks: Callable[[], Iterable[Tensor]],
    maps: Iterable[Tensor],
    *,
    decoding: MapDecoding,
    label_map_KJ: Tensor,
    image_hw: tuple[int, int],
    original_hw: tuple[int, int],
    top_k: int,
    repeats: bool = True,
) -> VideoTracks:
    """Find tracks with nothing but the detector: matched queries, class logits averaged over time.

    `blocks` yields the normed queries (t, Q, C) of consecutive frames, twice: once for the classes, then beside
    `maps`, in the same blocks. Both are dropped one after another: only the queries' orders and the run lengths grow
    with the video, by a few kB a frame. `label_map_KJ` says which detector classes count as which label; labels
    without one are never predicted (where the detector knows none, nothing is). Scores and masks are then made as for
    the head (`evaluate.tracks.inference`).
    """
    orders, summed_QJ, aligned_tQC = list[Tensor](), torch.zeros(()), None
    for normed_tQC in blocks():
        order_tQ = follow_queries(normed_tQC, None if aligned_tQC is None else aligned_tQC[-1])
        orders.append(order_tQ.to(normed_tQC.device))
        aligned_tQC = torch.take_along_dim(normed_tQC, orders[-1][..., None], dim=1)
        summed_QJ = summed_QJ + heads.class_embed(aligned_tQC).sum(dim=0)
    num_frames = sum(map(len, orders))
    probability_QJ = (summed_QJ / num_frames).softmax(dim=-1)[:, :-1]
    score_QK = probability_QJ @ label_map_KJ.t()
    possible = (score_QK if repeats else score_QK.amax(dim=1)).count_nonzero()  # the order among zeros means nothing
    found = best_labels(score_QK, min(top_k, int(possible)), repeats)
    decoder = MaskDecoder(len(found.queries_M), image_hw, original_hw, probability_QJ.device)
    chosen = [order_tQ[:, found.queries_M] for order_tQ in orders]
    decoder.decode(_logits(heads, decoding, chosen, blocks(), maps))
    return assemble_tracks(found, decoder)


def _logits(
    heads: FrozenHeads,
    decoding: MapDecoding,
    chosen: Sequence[Tensor],
    blocks: Iterable[Tensor],
    maps: Iterable[Tensor],
) -> Iterator[Tensor]:
    """Logits (t, M, H, W) of the queries `chosen`, (t, M) each."""
    for chosen_tM, normed_tQC, map_tRHW in zip(chosen, blocks, maps, strict=True):
        chosen_tMC = torch.take_along_dim(normed_tQC, chosen_tM[..., None], dim=1)
        yield heads.predict(chosen_tMC, decoding).mask_weights.logits(map_tRHW)
