"""Similarity loss between frame queries and video queries of one object (VITA §3.3, Eq. 5).

Shapes: B clips, T frames, N objects, M matched objects, L detector layers, S matched embeddings of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import AnnotationError
from train_head.losses.matcher import ClipMatch
from train_head.losses.targets import ClipTargets


def similarity_loss(
    frame_similarity_LBTQC: Tensor,
    clip_similarity_LBVC: Tensor,
    targets: Sequence[ClipTargets],
    matches: Sequence[ClipMatch],
    num_pairs: Tensor,
) -> Tensor:
    """Cross-entropy of all pairs' dot products, target 1 for equal objects; the mean over pairs of one clip.

    The pairs are those of one (layer, clip): matched frame queries of all frames and matched video queries of
    the last decoder layer, each pair twice and the diagonal included, as in the release. `num_pairs` is
    the divisor (`num_similarity_pairs`, summed over processes).
    VITA: the release builds one matrix over the batch and masks most of it; here each clip has its own.
    """
    total = frame_similarity_LBTQC.new_zeros((), dtype=torch.float32)
    for clip, (target, match) in enumerate(zip(targets, matches, strict=True)):
        queries_LTN = target.frame_queries_LTN
        if queries_LTN is None:
            raise AnnotationError(
                f"clip {clip} has no frame matches, which the similarity loss needs",
                hint="compute them with train_head.losses.frame_matches, or set head.use_sim=false",
            )
        frames_LSC = _gather_frames(frame_similarity_LBTQC[:, clip], queries_LTN)
        clips_LMC = torch.take_along_dim(clip_similarity_LBVC[:, clip], match.query_DLM[-1][..., None], dim=1)
        embeddings_LSC = torch.cat([frames_LSC, clips_LMC], dim=1).float()
        total = total + _pair_losses(embeddings_LSC, *_identities(queries_LTN, match.object_DLM[-1]))
    return total / num_pairs


def num_similarity_pairs(targets: Sequence[ClipTargets], num_queries: int) -> Tensor:
    """Pairs that the loss averages over: Σ over layers and clips of (matched frame + video queries)²."""
    total = torch.zeros((), device=targets[0].labels_N.device)
    for target in targets:
        if target.frame_queries_LTN is not None:
            frames_L = (target.frame_queries_LTN >= 0).flatten(1).sum(dim=1)
            total = total + (frames_L + min(num_queries, target.num_objects)).square().sum()
    return total + 1e-6


def _gather_frames(embeddings_LTQC: Tensor, queries_LTN: Tensor) -> Tensor:
    """Embeddings (L, T·N, C) of the matched frame queries; where there is none, those of query 0 (masked)."""
    chosen = torch.take_along_dim(embeddings_LTQC, queries_LTN.clamp_min(0)[..., None], dim=2)
    return chosen.flatten(1, 2)


def _identities(queries_LTN: Tensor, objects_LM: Tensor) -> tuple[Tensor, Tensor]:
    """Object index and validity of every embedding of a clip: both (L, S)."""
    L, T, N = queries_LTN.shape
    objects_LTN = torch.arange(N, device=queries_LTN.device).expand(L, T, N).flatten(1)
    valid_LM = torch.ones_like(objects_LM, dtype=torch.bool)
    return torch.cat([objects_LTN, objects_LM], dim=1), torch.cat([queries_LTN.flatten(1) >= 0, valid_LM], dim=1)


def _pair_losses(embeddings_LSC: Tensor, objects_LS: Tensor, valid_LS: Tensor) -> Tensor:
    with torch.autocast(embeddings_LSC.device.type, enabled=False):
        logits_LSS = embeddings_LSC @ embeddings_LSC.transpose(1, 2)
        same_LSS = (objects_LS[:, :, None] == objects_LS[:, None]).to(logits_LSS.dtype)
        losses_LSS = F.binary_cross_entropy_with_logits(logits_LSS, same_LSS, reduction="none")
        pairs_LSS = valid_LS[:, :, None] & valid_LS[:, None]
        return losses_LSS.where(pairs_LSS, losses_LSS.new_zeros(())).sum()
