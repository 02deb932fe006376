"""Which videos make the difference between two groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.compare.groups import Group
from evaluate.metrics.video_ap import defined
from evaluate.metrics.weighted import FloatArray


@dataclass(frozen=True, kw_only=True)
class ChangedVideo:
    """A video and what it does to the difference in AP between a group and the first (fractions)."""

    video_id: int
    name: str
    group: str
    influence: float  # the difference with the video, less the difference without it
    ap_first: float | None  # of this video alone
    ap_group: float | None


def changed_videos(groups: Sequence[Group], count: int) -> tuple[ChangedVideo, ...]:
    """Rank the videos by how much leaving one out changes the difference of the second group to the first.

    A track can hurt AP far from its own video, by standing above others in the ranking; so the whole split's AP is
    taken with and without the video (the jackknife), not the video's own AP.
    """
    if len(groups) < 2:
        return ()
    first, second = groups[0], groups[1]
    videos = first.entries[0].labels.videos
    influence_V = _influence(second) - _influence(first)
    alone = [_alone(group) for group in (first, second)]
    order = np.argsort(-np.abs(influence_V), kind="stable")[:count]
    return tuple(
        ChangedVideo(
            video_id=videos[v].id,
            name=videos[v].name,
            group=second.name,
            influence=float(influence_V[v]),
            ap_first=defined(float(alone[0][v])),
            ap_group=defined(float(alone[1][v])),
        )
        for v in order.tolist()
    )


def _influence(group: Group) -> FloatArray:
    """AP of the whole split less AP without each video, (V,), mean over seeds; 0 where that is undefined."""
    num_videos = len(group.entries[0].labels.videos)
    weights_SV = np.vstack([np.ones((1, num_videos)), 1 - np.eye(num_videos)])
    ap_S = _ap(group, weights_SV)
    return np.asarray(np.nan_to_num(ap_S[0] - ap_S[1:]))


def _alone(group: Group) -> FloatArray:
    return _ap(group, np.eye(len(group.entries[0].labels.videos)))


def _ap(group: Group, weights_SV: FloatArray) -> FloatArray:
    return np.asarray(np.mean([e.evaluation.scores(weights_SV).headline()["AP"] for e in group.entries], axis=0))
