"""Precision over recall, as COCO reads it. Shapes: K categories, T IoU thresholds, R recall levels, D detections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluate.metrics.weighted import RECALLS, THRESHOLDS, CategoryMatches, FloatArray


def precision_curves(matches: Sequence[CategoryMatches]) -> FloatArray:
    """Precision (T, R) at every recall level, the mean over categories with objects; its mean over R is AP.

    As COCO's, a curve never rises: it shows the best precision that is reached at this recall or beyond.
    """
    curves = [_category_curves(category) for category in matches if category.objects_V.sum() > 0]
    return np.mean(curves, axis=0) if curves else np.zeros((len(THRESHOLDS), len(RECALLS)))


def _category_curves(matches: CategoryMatches) -> FloatArray:
    hits_TD = matches.hit_TD.cumsum(axis=1)
    counted_TD = matches.counted_TD.cumsum(axis=1)
    precision_TD = hits_TD / np.maximum(counted_TD, 1)
    envelope_TD = np.maximum.accumulate(precision_TD[:, ::-1], axis=1)[:, ::-1]
    recall_TD = hits_TD / matches.objects_V.sum()
    curves_TR = np.zeros((len(hits_TD), len(RECALLS)))
    for t, (recall_D, envelope_D) in enumerate(zip(recall_TD, envelope_TD, strict=True)):
        first_R = np.searchsorted(recall_D, RECALLS, side="left")
        reached_R = first_R < len(recall_D)
        curves_TR[t, reached_R] = envelope_D[first_R[reached_R]]
    return curves_TR
