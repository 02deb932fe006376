"""Why a track is wrong, and what AP would be gained if it were not: TIDE's error types for whole tracks.

Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, with
the video IoU in place of the box IoU. A track that finds no object at the threshold t is a false alarm, and the
first of these that fits:

    badly localised   0.1 <= IoU < t with an object of its category
    misclassified     IoU >= t with an object of another category
    duplicate         IoU >= t with an object of its category, which a better track has found
    background        IoU < 0.1 with every object
    both              what is left: of another category, and badly localised

An object that no track finds, nor would find but for its category or its localisation, is missed. An oracle mends
one type at a time: a badly localised or misclassified track finds its object, unless a better one does; every other
false alarm is removed; a missed object is no longer asked for. Shapes: P predictions, D counted detections, K
categories.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from cache.labels.tracks import Labels
from evaluate.metrics.video_ap import VideoEvaluation, mean_defined
from evaluate.metrics.video_iou import track_ious
from evaluate.metrics.weighted import THRESHOLDS, CategoryMatches, FloatArray, IntArray, weighted_scores

BACKGROUND_IOU = 0.1
_HIT = -1


class ErrorType(Enum):
    """What is wrong with a track or, for `missed`, with an object; the value is its name in tables."""

    localised = "badly localised"
    misclassified = "misclassified"
    duplicate = "duplicate"
    background = "background"
    both = "misclassified and badly localised"
    missed = "missed"


_TYPES = tuple(ErrorType)


@dataclass(frozen=True, kw_only=True)
class ErrorWeight:
    """One type: how often at IoU 0.5, and what mending it alone gains (fractions)."""

    count: int
    gain_ap50: float
    gain_ap: float  # mean over the ten thresholds; the types are sorted out anew at each


@dataclass(frozen=True, kw_only=True)
class ErrorAnalysis:
    """The errors of one list of predictions."""

    weights: Mapping[ErrorType, ErrorWeight]
    false_alarms: Mapping[int, ErrorType]  # at IoU 0.5: index of the prediction -> type, by descending score
    missed: tuple[int, ...]  # at IoU 0.5: indices of the label file's tracks


@dataclass(frozen=True, kw_only=True)
class _BestOverlaps:
    """Each prediction's highest IoU with objects of its own and of other categories, and with which; -1: none."""

    own_P: FloatArray
    own_object_P: IntArray
    other_P: FloatArray
    other_object_P: IntArray


@dataclass(frozen=True, kw_only=True)
class _Detections:
    """The detections that count at one threshold."""

    found_D: IntArray  # index of the prediction
    category_D: IntArray  # class index
    score_D: FloatArray
    error_D: IntArray  # index in _TYPES, or _HIT
    object_D: IntArray  # the object that it finds, or would if it were mended; -1: none
    objects_K: IntArray  # how many are to be found


def analyse_errors(evaluation: VideoEvaluation) -> ErrorAnalysis:
    """Sort the errors of an evaluation's predictions into types."""
    wanted = np.array([g for g, track in enumerate(evaluation.labels.tracks) if not track.iscrowd], dtype=np.int64)
    overlaps = _best_overlaps(evaluation, wanted)
    at_threshold = [_sorted_out(evaluation.matches, overlaps, t) for t in range(len(THRESHOLDS))]
    missed = [_missed(detections, wanted) for detections in at_threshold]
    first = at_threshold[0]
    weights = {}
    for error in ErrorType:
        gains = [
            _gain(detections, error, evaluation.labels, lost)
            for detections, lost in zip(at_threshold, missed, strict=True)
        ]
        count = len(missed[0]) if error is ErrorType.missed else int((first.error_D == _TYPES.index(error)).sum())
        weights[error] = ErrorWeight(count=count, gain_ap50=gains[0], gain_ap=float(np.mean(gains)))
    wrong = [d for d in np.argsort(-first.score_D, kind="stable").tolist() if first.error_D[d] != _HIT]
    false_alarms = {int(first.found_D[d]): _TYPES[first.error_D[d]] for d in wrong}
    return ErrorAnalysis(weights=weights, false_alarms=false_alarms, missed=missed[0])


def _best_overlaps(evaluation: VideoEvaluation, objects: IntArray) -> _BestOverlaps:
    """`objects`: those to find, as indices of the label file's tracks."""
    predictions, labels = evaluation.predictions, evaluation.labels
    shape = len(predictions)
    best = _BestOverlaps(
        own_P=np.zeros(shape),
        own_object_P=np.full(shape, -1),
        other_P=np.zeros(shape),
        other_object_P=np.full(shape, -1),
    )
    found_in, wanted_in = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for index, track in enumerate(predictions):
        found_in[track.video_id].append(index)
    for index in objects.tolist():
        wanted_in[labels.tracks[index].video_id].append(index)
    for video in found_in.keys() & wanted_in.keys():
        found, wanted = found_in[video], wanted_in[video]
        ious_DG = track_ious([evaluation.found_masks[d] for d in found], [evaluation.label_masks[g] for g in wanted])
        own_DG = np.array(
            [[predictions[d].category_id == labels.tracks[g].category_id for g in wanted] for d in found], dtype=bool
        )
        for values, best_objects, chosen_DG in (
            (best.own_P, best.own_object_P, own_DG),
            (best.other_P, best.other_object_P, ~own_DG),
        ):
            masked_DG = np.where(chosen_DG, ious_DG, 0.0)
            values[found] = masked_DG.max(axis=1)
            best_objects[found] = np.where(masked_DG.max(axis=1) > 0, np.array(wanted)[masked_DG.argmax(axis=1)], -1)
    return best


def _sorted_out(matches: Sequence[CategoryMatches], overlaps: _BestOverlaps, threshold: int) -> _Detections:
    """Give every counted detection its type and its object at one of THRESHOLDS."""
    counted = [category.counted_TD[threshold] for category in matches]
    found_D = np.concatenate([c.found_D[keep] for c, keep in zip(matches, counted, strict=True)])
    matched_D = np.concatenate([c.object_TD[threshold, keep] for c, keep in zip(matches, counted, strict=True)])
    own_D, other_D = overlaps.own_P[found_D], overlaps.other_P[found_D]
    t = THRESHOLDS[threshold]
    conditions = {
        _HIT: matched_D >= 0,
        _TYPES.index(ErrorType.localised): (own_D >= BACKGROUND_IOU) & (own_D < t),
        _TYPES.index(ErrorType.misclassified): other_D >= t,
        _TYPES.index(ErrorType.duplicate): own_D >= t,
        _TYPES.index(ErrorType.background): np.maximum(own_D, other_D) < BACKGROUND_IOU,
    }
    error_D = np.select(list(conditions.values()), list(conditions), default=_TYPES.index(ErrorType.both))
    mendable = {
        _HIT: matched_D,
        _TYPES.index(ErrorType.localised): overlaps.own_object_P[found_D],
        _TYPES.index(ErrorType.misclassified): overlaps.other_object_P[found_D],
    }
    return _Detections(
        found_D=found_D,
        category_D=np.repeat(np.arange(len(matches)), [int(keep.sum()) for keep in counted]),
        score_D=np.concatenate([c.score_D[keep] for c, keep in zip(matches, counted, strict=True)]),
        error_D=error_D,
        object_D=np.select([error_D == code for code in mendable], list(mendable.values()), default=-1),
        objects_K=np.array([c.objects_V.sum() for c in matches]),
    )


def _missed(detections: _Detections, wanted: IntArray) -> tuple[int, ...]:
    return tuple(np.setdiff1d(wanted, detections.object_D).tolist())


def _gain(detections: _Detections, error: ErrorType, labels: Labels, missed: Sequence[int]) -> float:
    """AP at this threshold with one type mended, less AP as it is; 0 where there is nothing to find."""
    if error is ErrorType.missed:
        lost = [labels.category_index[labels.tracks[index].category_id] for index in missed]
        lost_K = np.bincount(np.array(lost, dtype=np.int64), minlength=len(detections.objects_K))
        mended = replace(detections, objects_K=detections.objects_K - lost_K)
    else:
        mended = _mend(detections, error, labels)
    gain = _average_precision(mended) - _average_precision(detections)
    return 0.0 if np.isnan(gain) else gain


def _mend(detections: _Detections, error: ErrorType, labels: Labels) -> _Detections:
    """The detections without one type: each removed, but those that become the finder of an object."""
    error_D, category_D = detections.error_D.copy(), detections.category_D.copy()
    wrong_D = error_D == _TYPES.index(error)
    if error in (ErrorType.localised, ErrorType.misclassified):
        taken = set(detections.object_D[error_D == _HIT].tolist())
        for d in np.argsort(-detections.score_D, kind="stable").tolist():
            found = int(detections.object_D[d])
            if wrong_D[d] and found not in taken:
                taken.add(found)
                error_D[d], wrong_D[d] = _HIT, False
                category_D[d] = labels.category_index[labels.tracks[found].category_id]
    return replace(
        detections,
        found_D=detections.found_D[~wrong_D],
        category_D=category_D[~wrong_D],
        score_D=detections.score_D[~wrong_D],
        error_D=error_D[~wrong_D],
        object_D=detections.object_D[~wrong_D],
    )


def _average_precision(detections: _Detections) -> float:
    """Mean AP over categories, all detections in one pool, as if of one video."""
    matches = []
    for k, objects in enumerate(detections.objects_K.tolist()):
        own = np.flatnonzero(detections.category_D == k)
        own = own[np.argsort(-detections.score_D[own], kind="stable")]
        hit_1D = (detections.error_D[own] == _HIT)[None]
        matches.append(
            CategoryMatches(
                found_D=detections.found_D[own],
                score_D=detections.score_D[own],
                video_D=np.zeros(len(own), dtype=np.int64),
                rank_D=np.arange(len(own)),
                object_TD=np.where(hit_1D, detections.object_D[own], -1),
                counted_TD=np.ones((1, len(own)), dtype=bool),
                objects_V=np.array([objects]),
            )
        )
    return mean_defined(weighted_scores(matches, np.ones((1, 1))).ap_SKT)
