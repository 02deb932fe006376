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
from train_head.losses.problem import LossProblem
from train_head.losses.targets import ClipTargets


def similarity_sum(problem: LossProblem, matches: Sequence[ClipMatch]) -> Tensor:
    """Cross-entropy of all pairs' dot products, target 1 for equal objects; summed over the pairs of each clip.

    The pairs are those of one (layer, clip): matched frame queries of all frames and matched video queries of
    the last decoder layer, each pair twice and the diagonal included, as in the release. Its divisor is
    `num_similarity_pairs`, summed over processes.
    VITA: the release builds one matrix over the batch and masks most of it; here each clip has its own.
    """
    frame_similarity_LBTQC = problem.outputs.frame_similarity_LBTQC
    clip_similarity_LBVC = problem.outputs.clip_similarity_LBVC
    assert frame_similarity_LBTQC is not None and clip_similarity_LBVC is not None
    total = frame_similarity_LBTQC.new_zeros((), dtype=torch.float32)
    for clip, (target, match) in enumerate(zip(problem.targets, matches, strict=True)):
        queries_LTN = frame_queries_of(target, clip)
        frames_LSC = _gather_frames(frame_similarity_LBTQC[:, clip], queries_LTN)
        clips_LMC = torch.take_along_dim(clip_similarity_LBVC[:, clip], match.query_DLM[-1][..., None], dim=1)
        embeddings_LSC = torch.cat([frames_LSC, clips_LMC], dim=1).float()
        total = total + pair_losses(embeddings_LSC, *_identities(queries_LTN, match.object_DLM[-1]))
    return total


def frame_queries_of(target: ClipTargets, clip: int) -> Tensor:
    """The frame matches (L, T, N) of a clip. Raises AnnotationError where it has none."""
    if target.frame_queries_LTN is None:
        raise AnnotationError(
            f"clip {clip} has no frame matches, which the similarity loss needs",
            hint="compute them with train_head.losses.frame_matches, or set loss.sim_weight=0",
        )
    return target.frame_queries_LTN


def num_similarity_pairs(targets: Sequence[ClipTargets], num_queries: int) -> Tensor:
    """Pairs that the loss averages over: Σ over layers and clips of (matched frame + video queries)²."""
    total = 0
    for target in targets:
        if target.frame_queries_LTN is not None:
            frames_L = (target.frame_queries_LTN.numpy() >= 0).sum(axis=(1, 2))
            total += int(((frames_L + min(num_queries, target.num_objects)) ** 2).sum())
    return torch.tensor(total, dtype=torch.float32) + 1e-6


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


def pair_losses(embeddings_LSC: Tensor, objects_LS: Tensor, valid_LS: Tensor) -> Tensor:
    """Summed cross-entropy of all valid pairs within each of L sets, float32."""
    with torch.autocast(embeddings_LSC.device.type, enabled=False):
        logits_LSS = embeddings_LSC @ embeddings_LSC.transpose(1, 2)
        same_LSS = (objects_LS[:, :, None] == objects_LS[:, None]).to(logits_LSS.dtype)
        losses_LSS = F.binary_cross_entropy_with_logits(logits_LSS, same_LSS, reduction="none")
        pairs_LSS = valid_LS[:, :, None] & valid_LS[:, None]
        return losses_LSS.where(pairs_LSS, losses_LSS.new_zeros(())).sum()
