"""AP and AR from matches, for any weights of the videos: a video of weight 2 counts as two copies of it.

So one matching serves the benchmark's numbers (weights 1), parts of a split (weights 0 and 1) and a bootstrap
over videos (how often each was drawn). Shapes: S sets of weights, V videos, K categories, T IoU thresholds,
D detections of one category, H of them that hit at some threshold, N limits on detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = (1, 10, 100)
HEADLINE = ("AP", "AP50", "AP75", "AR1", "AR10")
RECALLS = np.linspace(0.0, 1.0, 101)
_MAX_ELEMENTS = 2**20  # of one (S, T, D) array: small enough for the processor's cache


@dataclass(frozen=True, kw_only=True)
class CategoryMatches:
    """The detections (D) of one category in all videos, by descending score, matched to its objects."""

    found_D: IntArray  # index among the predictions
    score_D: FloatArray
    video_D: IntArray  # row of the video, 0 .. V-1
    rank_D: IntArray  # among the category's detections in its video, from 0
    object_TD: IntArray  # index among the label file's tracks of the object it is matched to, or -1
    counted_TD: BoolArray  # a hit or a false alarm; False where COCO ignores the detection (crowds, other sizes)
    objects_V: IntArray  # objects to find

    @property
    def hit_TD(self) -> BoolArray:  # noqa: N802  # shape suffix
        """Which detections find an object that counts."""
        return (self.object_TD >= 0) & self.counted_TD


@dataclass(frozen=True, kw_only=True)
class Scores:
    """AP and recall for S sets of weights, fractions in [0, 1]; NaN where there is nothing to find."""

    ap_SKT: FloatArray
    recall_SKTN: FloatArray  # with at most MAX_DETECTIONS[n] tracks a video and category

    def headline(self) -> dict[str, FloatArray]:
        """The five numbers of the benchmarks' tables, (S,) each, by the names in HEADLINE."""
        recall_SN = _mean(self.recall_SKTN, (1, 2))
        return {
            "AP": _mean(self.ap_SKT, (1, 2)),
            "AP50": _mean(self.ap_SKT[:, :, 0], 1),
            "AP75": _mean(self.ap_SKT[:, :, 5], 1),
            "AR1": recall_SN[:, 0],
            "AR10": recall_SN[:, 1],
        }

    def by_category(self) -> FloatArray:
        """AP of every category, (S, K)."""
        return _mean(self.ap_SKT, 2)


def weighted_scores(matches: Sequence[CategoryMatches], weights_SV: NDArray[np.integer] | FloatArray) -> Scores:
    """Accumulate matches of K categories under S sets of weights.

    For whole numbers this equals COCOeval on a list of videos that holds each as often as its weight says, where
    copies of a detection are ranked side by side (tied scores have no order of their own).
    """
    weights_SV = np.asarray(weights_SV, dtype=np.float64)
    num_thresholds = len(THRESHOLDS) if not matches else len(matches[0].object_TD)
    shape = (len(weights_SV), len(matches), num_thresholds)
    ap_SKT, recall_SKTN = np.empty(shape), np.empty((*shape, len(MAX_DETECTIONS)))
    for k, category in enumerate(matches):
        rows = max(1, _MAX_ELEMENTS // max(1, category.object_TD.size))
        for start in range(0, len(weights_SV), rows):
            part = slice(start, start + rows)
            ap_SKT[part, k], recall_SKTN[part, k] = _category_scores(category, weights_SV[part])
    return Scores(ap_SKT=ap_SKT, recall_SKTN=recall_SKTN)


def precision_curves(matches: Sequence[CategoryMatches]) -> FloatArray:
    """Precision (T, R) at every recall of RECALLS, the mean over categories with objects; its mean over R is AP.

    As COCO's, a curve never rises: it shows the best precision that is reached at this recall or beyond.
    """
    curves = []
    for category in matches:
        if category.objects_V.sum() > 0:
            curves.append(np.zeros((len(category.hit_TD), len(RECALLS))))
            _, envelope_1TH, newly_1TH = _recall_steps(category, np.ones((1, len(category.objects_V))))
            for curve_R, envelope_H, newly_H in zip(curves[-1], envelope_1TH[0], newly_1TH[0], strict=True):
                curve_R[: newly_H.sum()] = np.repeat(envelope_H, newly_H)
    return np.mean(curves, axis=0) if curves else np.zeros((len(THRESHOLDS), len(RECALLS)))


def _category_scores(matches: CategoryMatches, weights_SV: FloatArray) -> tuple[FloatArray, FloatArray]:
    """AP (S, T) and recall (S, T, N) of one category."""
    recall_STN, envelope_STH, newly_STH = _recall_steps(matches, weights_SV)
    ap_ST = (envelope_STH * newly_STH).sum(axis=-1) / len(RECALLS)
    return np.where(np.isnan(recall_STN[..., 0]), np.nan, ap_ST), recall_STN


def _recall_steps(matches: CategoryMatches, weights_SV: FloatArray) -> tuple[FloatArray, FloatArray, IntArray]:
    """Recall (S, T, N); at every hit the best precision there or later, and how many of RECALLS it is the first to
    reach, (S, T, H) each.
    """
    objects_S1 = (weights_SV @ matches.objects_V)[:, None]
    objects_S1 = np.where(objects_S1 > 0, objects_S1, np.nan)
    weights_S1D = weights_SV[:, None, matches.video_D]
    # Precision rises at hits alone, and so do recall and its envelope: the other detections are only counted.
    hits = np.flatnonzero(matches.hit_TD.any(axis=0))
    hits_STH = weights_S1D[:, :, hits] * matches.hit_TD[:, hits]
    within_HN = matches.rank_D[hits, None] < np.array(MAX_DETECTIONS)
    recall_STN = (hits_STH @ within_HN) / objects_S1[:, :, None]
    hits_STH = hits_STH.cumsum(axis=-1)
    counted_STH = (weights_S1D * matches.counted_TD).cumsum(axis=-1)[..., hits]
    precision_STH = hits_STH / (counted_STH + np.spacing(1))
    envelope_STH = np.maximum.accumulate(precision_STH[..., ::-1], axis=-1)[..., ::-1]
    # COCO reads the envelope at 101 recalls; each falls to the first detection that reaches it.
    reached_STH = np.searchsorted(RECALLS, hits_STH / objects_S1[..., None], side="right")
    newly_STH = np.diff(np.where(hits_STH > 0, reached_STH, 0), axis=-1, prepend=0)
    return recall_STN, envelope_STH, newly_STH


def _mean(values: FloatArray, axis: int | tuple[int, ...]) -> FloatArray:
    """Mean of what is defined; NaN, without a warning, where nothing is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
