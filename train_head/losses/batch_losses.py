"""The losses of all clips at once, in as many operations as those of one: launches are what counts on a GPU.

Logits exist at points alone: there they are products of the embeddings with the sampled channels, for the matching and
for the losses. Points, matches and terms are those of `clip_losses`.

Shapes: B clips of a group, T frames, F = B·T, N objects and M matched objects of the clip that has most, Q = D·L·V
queries of all layers, G = D·L·M matched ones, P points, S candidates and fresh points, C channels (see `clip_group`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from train_head.losses.clip_group import ClipGroup, filled
from train_head.losses.clip_losses import frame_means
from train_head.losses.frame_sums import point_sums
from train_head.losses.host_copies import HostCopy, send
from train_head.losses.logit_visits import Visit, visit_on
from train_head.losses.matcher import ClipMatch, CostWeights, assign, costs_of_sums
from train_head.losses.points import LossPoints, choose_uncertain
from train_head.losses.problem import LossProblem, LossSums
from train_head.losses.similarity import frame_queries_of, pair_losses
from train_head.losses.targets import ClipTargets

_LOGITS_AT_ONCE = 1 << 27  # of the matching
_GROUP_NUMBERS = (
    1 << 30
)  # channels, logits and label values of the losses; more clips are taken one group after the other


def batch_losses(problem: LossProblem) -> LossSums:
    """Matches and sums of all clips. Raises as VitaCriterion does."""
    D = len(problem.mask_weights.weights_R)
    batch = _Batch.of(problem)
    costs = batch.costs()
    # Queued before the host waits for the costs, so that the device has work while matches are sought.
    sampled = [batch.sampled(group) for group in batch.groups]
    matches = batch.assign(costs)
    # 0, but with gradients of 0 for whatever takes any.
    mask_D = dice_D = torch.unflatten(batch.weights_BQC[..., :0], 1, (D, -1)).sum(dim=(0, 2, 3))
    if not batch.groups:
        mask_D = mask_D + torch.cat([map_TRHW[..., :0].flatten() for map_TRHW in problem.maps]).sum()
    for group, points in zip(batch.groups, sampled, strict=True):
        pairs = _Pairs.of(problem, group, matches[group.clips])
        mask_GD, dice_GD = _mask_losses(batch.weights_BQC[group.clips], points, pairs, D)
        mask_D, dice_D = mask_D + mask_GD, dice_D + dice_GD
    similarity = _similarity_sum(problem, matches) if problem.has_similarity else None
    return LossSums(matches=matches, mask_D=mask_D, dice_D=dice_D, similarity=similarity)


def match_batch(problem: LossProblem) -> tuple[ClipMatch, ...]:
    """Match every clip for every layer."""
    batch = _Batch.of(problem)
    return batch.assign(batch.costs())


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    """Channels and labels at the points that the losses choose from."""

    channels_BTSC: Tensor
    labels_BTNS: Tensor
    num_candidates: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """All clips of a problem: their weights, points and groups. Clips without objects draw points as others do."""

    problem: LossProblem
    weights_BQC: Tensor
    matching_points: list[Tensor]
    loss_points: list[LossPoints]
    groups: list[ClipGroup]

    @classmethod
    def of(cls, problem: LossProblem) -> _Batch:
        device, T = problem.maps[0].device, len(problem.maps[0])
        none = torch.zeros(1, 2, device=device)
        clips = list(zip(problem.points, problem.targets, strict=True))
        matching = [source.matching_points(device) if target.num_objects else none for source, target in clips]
        num_points = max(len(points_P2) for points_P2 in matching)
        loss_points = [source.loss_points(T, device) for source, _ in clips]
        weights_BQC = filled(problem.mask_weights.stacked()).permute(2, 0, 1, 3, 4).flatten(1, 3)
        return cls(
            problem=problem,
            weights_BQC=weights_BQC,
            matching_points=[points_P2.expand(num_points, -1) for points_P2 in matching],
            loss_points=loss_points,
            groups=[
                ClipGroup.of(part, problem.maps, problem.targets, problem.padded_area)
                for part in _parts(problem, loss_points[0].points_GS2.shape[1], weights_BQC.shape[2])
            ],
        )

    @torch.no_grad()
    def costs(self) -> list[HostCopy]:
        """Every group's costs (B, Q, N), on their way to the host."""
        problem = self.problem
        visit = visit_on(self.weights_BQC.device, problem.logit_type)
        probabilities_DLBVK = problem.outputs.class_logits_DLBVK.float().softmax(dim=-1)
        probabilities_BQK = probabilities_DLBVK.permute(2, 0, 1, 3, 4).flatten(1, 3)
        copies = []
        for group in self.groups:
            weights_BQC = self.weights_BQC[group.clips]
            points_B1P2 = torch.stack(self.matching_points[group.clips])[:, None]
            channels_BTPC, labels_BTNP = group.at(points_B1P2)
            cost_BQN = pair_costs(
                weights_BQC, channels_BTPC, labels_BTNP, problem.cost_weights, problem.logit_type, visit
            )
            labels_BQN = group.labels_BN[:, None].expand(-1, weights_BQC.shape[1], -1)
            cost_BQN -= problem.cost_weights.label * probabilities_BQK[group.clips].gather(2, labels_BQN)
            copies.append(HostCopy(cost_BQN))
        return copies

    def sampled(self, group: ClipGroup) -> _Sampled:
        """What the losses of a group need at its points."""
        points = self.loss_points[group.clips]
        channels_BTSC, labels_BTNS = group.at(torch.stack([one.points_GS2 for one in points]))
        return _Sampled(
            channels_BTSC=channels_BTSC,
            labels_BTNS=labels_BTNS,
            num_candidates=points[0].num_candidates,
            keep=points[0].keep,
        )

    def assign(self, costs: Sequence[HostCopy]) -> tuple[ClipMatch, ...]:
        """Wait for the costs and solve the matching problems of all clips."""
        D, L, _, V, _ = self.problem.outputs.class_logits_DLBVK.shape
        none = np.empty((D, L, V, 0), dtype=np.float32)
        of_clip = [none] * len(self.problem.targets)
        for group, copy in zip(self.groups, costs, strict=True):
            of_clip[group.clips] = [cost_QN.reshape(D, L, V, -1) for cost_QN in copy.wait()]
        pairs = zip(of_clip, self.problem.targets, strict=True)
        solved = assign([cost_DLVN[..., : target.num_objects] for cost_DLVN, target in pairs])
        return tuple(ClipMatch(query_DLM=query, object_DLM=chosen) for query, chosen in solved)


def _parts(problem: LossProblem, num_points: int, num_channels: int) -> list[slice]:
    """Runs of clips whose losses fit into memory at once; those without any object are left out."""
    D, L, _, V, _ = problem.outputs.class_logits_DLBVK.shape
    points = len(problem.maps[0]) * num_points
    parts, start, largest = [], 0, 0
    counts = [target.num_objects for target in problem.targets]
    for clip, count in enumerate([*counts, None]):
        most = max(largest, count or 0)
        numbers = (clip + 1 - start) * points * (num_channels + D * L * min(V, most) + 8 * most)
        if count is None or (clip > start and numbers > _GROUP_NUMBERS):
            if largest:
                parts.append(slice(start, clip))
            start, most = clip, count or 0
        largest = most
    return parts


def pair_costs(
    weights_BQC: Tensor,
    channels_BTPC: Tensor,
    labels_BTNP: Tensor,
    weights: CostWeights,
    logit_type: torch.dtype,
    visit: Visit,
) -> Tensor:
    """Mask and dice costs (B, Q, N), as `point_costs` has them of one clip; some frames at a time."""
    B, T, _, P = labels_BTNP.shape
    columns_FNP = F.pad(labels_BTNP, (0, 0, 0, 1), value=1.0).flatten(0, 1)
    channels_FPC = channels_BTPC.flatten(0, 1)
    channel_sums_BNC = torch.unflatten(columns_FNP @ channels_FPC, 0, (B, T)).sum(dim=1)
    linear_BQN = weights_BQC @ channel_sums_BNC.mT
    typed_FQC = weights_BQC.to(logit_type)[:, None].expand(-1, T, -1, -1).flatten(0, 1)
    frames = max(1, _LOGITS_AT_ONCE // (typed_FQC.shape[1] * P))
    overlaps, positives = [], []
    for part in (slice(start, start + frames) for start in range(0, B * T, frames)):
        probability_FQP, positive_FQ = visit(typed_FQC[part] @ channels_FPC[part].to(logit_type).mT)
        overlaps.append(probability_FQP @ columns_FNP[part].mT)
        positives.append(positive_FQ)
    overlap_BQN, positive_BQ = (
        torch.unflatten(torch.cat(sums), 0, (B, T)).sum(dim=1) for sums in (overlaps, positives)
    )
    areas_BN = labels_BTNP.sum(dim=(1, 3))
    return costs_of_sums(linear_BQN, overlap_BQN, positive_BQ, areas_BN, T * P, weights)


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The matches of a group's clips, padded to M of each layer."""

    row_G: Tensor  # B·G, in the flat weights (B·Q, C)
    object_BG: Tensor
    valid_BG: Tensor  # 1, and 0 in the padding
    counted_BTG: Tensor | None  # frames that cross-entropy counts, if not all

    @classmethod
    def of(cls, problem: LossProblem, group: ClipGroup, matches: Sequence[ClipMatch]) -> _Pairs:
        D, L, _, V, _ = problem.outputs.class_logits_DLBVK.shape
        targets, B, T = problem.targets[group.clips], len(matches), len(problem.maps[0])
        M = max(match.query_DLM.shape[2] for match in matches)
        row_BDLM, object_BDLM = np.zeros((2, B, D, L, M), dtype=np.int64)
        valid_BDLM, counted_BTDLM = np.zeros((B, D, L, M), np.float32), np.ones((B, T, D, L, M), np.float32)
        layer_DL = np.arange(D * L).reshape(D, L, 1) * V
        for clip, (match, target) in enumerate(zip(matches, targets, strict=True)):
            count = match.query_DLM.shape[2]
            row_BDLM[clip, ..., :count] = clip * D * L * V + layer_DL + match.query_DLM.numpy()
            object_BDLM[clip, ..., :count] = objects = match.object_DLM.numpy()
            valid_BDLM[clip, ..., :count] = 1
            counted_BTDLM[clip, ..., :count] = target.present_NT.numpy().T[:, objects]
        row, chosen = send([row_BDLM.reshape(-1), object_BDLM.reshape(B, -1)], group.labels_BN.device)
        valid, counted = send([valid_BDLM.reshape(B, -1), counted_BTDLM.reshape(B, T, -1)], group.labels_BN.device)
        return cls(row_G=row, object_BG=chosen, valid_BG=valid, counted_BTG=None if problem.absent_frames else counted)


def _mask_losses(weights_BQC: Tensor, sampled: _Sampled, pairs: _Pairs, num_layers: int) -> tuple[Tensor, Tensor]:
    """Sums (D) of mask cross-entropy and dice over a group's matched queries."""
    B, _, C = weights_BQC.shape
    weights_BGC = weights_BQC.flatten(0, 1).index_select(0, pairs.row_G).view(B, -1, C)
    logits_BTGS = weights_BGC[:, None] @ sampled.channels_BTSC.mT
    index_BTGP = choose_uncertain(logits_BTGS, sampled.num_candidates, sampled.keep)
    offset_BG = pairs.object_BG * logits_BTGS.shape[-1]
    label_index_BTGP = index_BTGP + offset_BG[:, None, :, None]
    labels_BTGP = sampled.labels_BTNS.flatten(2).gather(2, label_index_BTGP.flatten(2)).view(index_BTGP.shape)
    sums_3BTG = point_sums(logits_BTGS.gather(3, index_BTGP), labels_BTGP)
    mask_BG, dice_BG = frame_means(sums_3BTG, pairs.counted_BTG)
    mask_D, dice_D = (
        torch.unflatten(loss_BG * pairs.valid_BG, 1, (num_layers, -1)).sum(dim=(0, 2)) for loss_BG in (mask_BG, dice_BG)
    )
    return mask_D, dice_D


def _similarity_sum(problem: LossProblem, matches: Sequence[ClipMatch]) -> Tensor:
    """`similarity_sum` of all clips, whose sets are padded."""
    frame_similarity_LBTQC = problem.outputs.frame_similarity_LBTQC
    clip_similarity_LBVC = problem.outputs.clip_similarity_LBVC
    assert frame_similarity_LBTQC is not None and clip_similarity_LBVC is not None
    frame_index_LBS, clip_index_LBM, identity_LBS = send(
        _similar_sets(problem.targets, matches, frame_similarity_LBTQC.shape[3]), clip_similarity_LBVC.device
    )
    frames_LBSC = torch.take_along_dim(frame_similarity_LBTQC.flatten(2, 3), frame_index_LBS[..., None], dim=2)
    clips_LBMC = torch.take_along_dim(clip_similarity_LBVC, clip_index_LBM[..., None], dim=2)
    embeddings_LSC = torch.cat([frames_LBSC, clips_LBMC], dim=2).float().flatten(0, 1)
    identity_LS = identity_LBS.flatten(0, 1)
    return pair_losses(embeddings_LSC, identity_LS, identity_LS >= 0)


def _similar_sets(
    targets: Sequence[ClipTargets], matches: Sequence[ClipMatch], num_frame_queries: int
) -> list[NDArray[np.int64]]:
    """Where the matched frame queries (L, B, T·N) and video queries (L, B, M) are, and whose all are: -1 = nobody's."""
    queries = [frame_queries_of(target, clip).numpy() for clip, target in enumerate(targets)]
    L, T, _ = queries[0].shape
    B, N = len(targets), max(target.num_objects for target in targets)
    M = max(match.query_DLM.shape[2] for match in matches)
    frame_index_LBTN = np.zeros((L, B, T, N), dtype=np.int64)
    identity_LBTN, identity_LBM = np.full((L, B, T, N), -1), np.full((L, B, M), -1)
    clip_index_LBM = np.zeros((L, B, M), dtype=np.int64)
    for clip, (queries_LTN, match) in enumerate(zip(queries, matches, strict=True)):
        count, matched = queries_LTN.shape[2], match.query_DLM.shape[2]
        frame_index_LBTN[:, clip, :, :count] = np.maximum(queries_LTN, 0)
        identity_LBTN[:, clip, :, :count] = np.where(queries_LTN >= 0, np.arange(count), -1)
        clip_index_LBM[:, clip, :matched] = match.query_DLM[-1]
        identity_LBM[:, clip, :matched] = match.object_DLM[-1]
    frame_index_LBTN += np.arange(T)[:, None] * num_frame_queries
    identity_LBS = np.concatenate([identity_LBTN.reshape(L, B, -1), identity_LBM], axis=2)
    return [frame_index_LBTN.reshape(L, B, -1), clip_index_LBM, identity_LBS]
