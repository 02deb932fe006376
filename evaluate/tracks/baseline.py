"""The training-free baseline: the frozen detector's own queries, followed from frame to frame (REFERENCE section 6).

Shapes: T frames, Q frame queries, C channels, K categories of the labels, J categories of the detector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from evaluate.tracks.inference import VideoTracks, assemble_tracks, best_labels
from evaluate.tracks.mask_decoding import MaskDecoder
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.mask_folding import MapDecoding, MaskWeights


def follow_queries(normed_TQC: Tensor) -> Tensor:
    """Match the queries of consecutive frames by cosine similarity (Hungarian).

    Returns (T, Q) int64: entry (t, q) is the query of frame t that continues query q of frame 0.
    """
    unit_TQC = F.normalize(normed_TQC.float(), dim=-1)
    order = torch.arange(unit_TQC.shape[1])
    orders = [order]
    for before_QC, now_QC in pairwise(unit_TQC):
        similarity_QQ = before_QC[order] @ now_QC.t()
        order = torch.from_numpy(linear_sum_assignment(similarity_QQ.cpu().numpy(), maximize=True)[1])
        orders.append(order)
    return torch.stack(orders)


@torch.no_grad()
def track_without_training(
    heads: FrozenHeads,
    normed_TQC: Tensor,
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

    `label_map_KJ` says which detector classes count as which label; labels without one are never predicted.
    Scores and masks are then made as for the head (`evaluate.tracks.inference`).
    """
    order_TQ = follow_queries(normed_TQC)
    aligned_TQC = torch.take_along_dim(normed_TQC, order_TQ.to(normed_TQC.device)[..., None], dim=1)
    predictions = heads.predict(aligned_TQC, decoding)
    probability_QJ = predictions.class_logits.mean(dim=0).softmax(dim=-1)[:, :-1]
    found = best_labels(probability_QJ @ label_map_KJ.t(), top_k, repeats)
    decoder = MaskDecoder(len(found.queries_M), image_hw, original_hw, normed_TQC.device)
    weights_TMR = predictions.mask_weights.weights_R[:, found.queries_M]
    const_TM = predictions.mask_weights.const[:, found.queries_M]
    decoder.decode(_logits(weights_TMR, const_TM, maps))
    return assemble_tracks(found, decoder)


def _logits(weights_TMR: Tensor, const_TM: Tensor, maps: Iterable[Tensor]) -> Iterator[Tensor]:
    first = 0
    for map_tRHW in maps:
        chunk = slice(first, first + len(map_tRHW))
        yield MaskWeights(weights_R=weights_TMR[chunk], const=const_TM[chunk]).logits(map_tRHW)
        first += len(map_tRHW)
