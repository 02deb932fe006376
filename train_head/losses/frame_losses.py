"""Losses of the detector on single frames: L_f of VITA (§3.3, Eq. 6), which is Mask2Former's own loss.

Every frame is a clip of one frame to the criterion of the head, and every prediction layer of the detector, the
learnable queries before its first layer included, is what a decoder layer is there. So matching, points and loss
terms exist once.

Shapes: D prediction layers, L of them that the head takes, B clips, T frames, F = B·T, Q frame queries, N objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from train_head.heads.contract import HeadOutputs
from train_head.heads.mask_folding import MaskWeights
from train_head.losses.criterion import LossNormalisers, VitaCriterion, VitaLosses
from train_head.losses.host_copies import send
from train_head.losses.matcher import ClipMatch
from train_head.losses.points import RandomPoints
from train_head.losses.targets import ClipTargets


def frame_normalisers(targets: Sequence[ClipTargets], num_queries: int, no_object: float) -> LossNormalisers:
    """What L_f of a batch is divided by: the objects of all frames, the class weights of all frame queries."""
    objects_F = torch.cat([target.present_NT.sum(dim=0) for target in targets]).float()
    matched_F = objects_F.clamp(max=num_queries)
    return LossNormalisers(
        num_masks=objects_F.sum(),
        class_weight=(matched_F + no_object * (num_queries - matched_F)).sum(),
        similarity_pairs=objects_F.new_ones(()),
    )


def expected_matches(target: ClipTargets, num_layers: int, num_queries: int) -> Tensor:
    """(L, T, N) with as many entries ≥ 0 as the frame matches will have: one for each object, up to Q a frame.

    The similarity loss is divided by a number of pairs of the whole batch, before the detector has run.
    """
    matched_NT = target.present_NT & (target.present_NT.cumsum(dim=0) <= num_queries)
    return matched_NT.t().long().sub(1).expand(num_layers, -1, -1)


def frame_losses(
    criterion: VitaCriterion,
    outputs: HeadOutputs,
    mask_weights: MaskWeights,
    maps: Sequence[Tensor],
    targets: Sequence[ClipTargets],
    points: Sequence[RandomPoints],
    normalisers: LossNormalisers,
) -> VitaLosses:
    """L_f of B clips. `outputs` and `mask_weights` have F frames as their B, 1 as their L; `maps` (T, R, H, W)."""
    frames = _single_frames(targets)
    frame_maps = [frame for map_TRHW in maps for frame in torch.split(map_TRHW, 1)]
    sources = [source for map_TRHW, source in zip(maps, points, strict=True) for _ in map_TRHW]
    return criterion(outputs, mask_weights, frame_maps, frames, sources, normalisers)


def with_frame_matches(
    targets: Sequence[ClipTargets], matches: Sequence[ClipMatch], num_layers: int
) -> list[ClipTargets]:
    """Targets with the last L layers' frame matches, from the matching of L_f (`VitaLosses.matches`)."""
    matched, start = [], 0
    for target in targets:
        stop = start + target.present_NT.shape[1]
        matched.append(replace(target, frame_queries_LTN=_frame_queries(target, matches[start:stop], num_layers)))
        start = stop
    return matched


def _single_frames(targets: Sequence[ClipTargets]) -> list[ClipTargets]:
    """Each frame as a clip of its own, with the objects that are present in it."""
    present = [
        (target, frame, objects) for target in targets for frame, objects in enumerate(target.objects_by_frame())
    ]
    sent = send([objects.numpy() for _, _, objects in present], targets[0].masks_NThw.device)
    return [
        ClipTargets(
            labels_N=target.labels_N[objects],
            identities_N=target.identities_N[objects],
            present_NT=target.present_NT[objects, frame, None],
            masks_NThw=target.masks_NThw[:, frame].index_select(0, rows)[:, None],
        )
        for (target, frame, objects), rows in zip(present, sent, strict=True)
    ]


def _frame_queries(target: ClipTargets, matches: Sequence[ClipMatch], num_layers: int) -> Tensor:
    N, T = target.present_NT.shape
    matches_LTN = target.labels_N.new_full((num_layers, T, N), -1)
    for frame, (objects, match) in enumerate(zip(target.objects_by_frame(), matches, strict=True)):
        objects_LM = objects[match.object_DLM[-num_layers:, 0]]
        matches_LTN[:, frame].scatter_(1, objects_LM, match.query_DLM[-num_layers:, 0])
    return matches_LTN
