"""The comparison itself: every group's numbers with intervals, and paired differences to the first group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluate.compare.groups import Group
from evaluate.compare.runs import Costs, Entry, detector_in_words
from evaluate.compare.videos import ChangedVideo, changed_videos
from evaluate.metrics.bootstrap import RESAMPLES, Difference, Interval, paired_difference, split_and_draws
from evaluate.metrics.breakdown import Part, parts_of
from evaluate.metrics.error_types import ErrorAnalysis, ErrorType, analyse_errors
from evaluate.metrics.weighted import HEADLINE, FloatArray
from evaluate.pictures.overlays import MIN_SCORE


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of one group: mean over its seeds, with what seeds and videos do to it (fractions)."""

    interval: Interval  # over videos
    spread: float | None  # standard deviation over seeds; None for one
    difference: Difference | None  # to the first group; None for that group itself


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group in the table."""

    name: str
    method: str
    runs: tuple[str, ...]
    metrics: dict[str, Measured]  # by the names in HEADLINE
    costs: Costs
    detector: str
    codec: str
    head: tuple[str, ...]  # of every run: when, where and with what it was trained


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """AP of every group on a part of the split."""

    kind: str
    name: str
    num_objects: int
    groups: tuple[Measured, ...]


@dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """One error type of every group, means over seeds."""

    error: str
    counts: tuple[float, ...]
    gains_ap50: tuple[float, ...]
    gains_ap: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FalseAlarmRow:
    """How many background tracks of a score every group gives a category, means over seeds."""

    category: str
    counts: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that the reports show."""

    split: str
    num_videos: int
    num_objects: int
    resamples: int
    warnings: tuple[str, ...]
    rows: tuple[Row, ...]
    parts: tuple[PartRow, ...]
    errors: tuple[ErrorRow, ...]
    false_alarms: tuple[FalseAlarmRow, ...]
    min_score: float  # of the tracks counted in `false_alarms`
    changed: tuple[ChangedVideo, ...]

    def to_json(self) -> dict[str, Any]:
        """Content of comparison.json; numbers are fractions, seconds and bytes."""
        return asdict(self)


def compare(
    groups: Sequence[Group],
    warnings: Sequence[str] = (),
    *,
    resamples: int = RESAMPLES,
    num_changed: int = 6,
    min_score: float = MIN_SCORE,
) -> Comparison:
    """Compare groups whose runs pair up (checks.require_pairs); the first is the reference."""
    first = groups[0].entries[0]
    num_videos = len(first.labels.videos)
    weights_SV = split_and_draws(num_videos, resamples)
    errors = [[analyse_errors(e.evaluation) for e in group.entries] for group in groups]
    return Comparison(
        split=first.split,
        num_videos=num_videos,
        num_objects=sum(not track.iscrowd for track in first.labels.tracks),
        resamples=resamples,
        warnings=tuple(warnings),
        rows=_rows(groups, weights_SV),
        parts=tuple(_part_row(groups, part, weights_SV) for part in parts_of(first.labels)),
        errors=tuple(_error_row(error, errors) for error in ErrorType),
        false_alarms=_false_alarms(groups, errors, min_score),
        min_score=min_score,
        changed=changed_videos(groups, num_changed),
    )


def measure(
    groups: Sequence[Group], weights_SV: FloatArray, scores: Callable[[Entry], FloatArray]
) -> tuple[Measured, ...]:
    """Measure every group by `scores` of an entry, (S,): the split as it is first, then the resamples."""
    values = [np.stack([scores(entry) for entry in group.entries]) for group in groups]  # (seeds, S) each
    means = [of_group.mean(axis=0) for of_group in values]
    return tuple(
        Measured(
            interval=Interval.of(mean),
            spread=_spread(of_group[:, 0]),
            difference=None if mean is means[0] else paired_difference(mean, means[0]),
        )
        for of_group, mean in zip(values, means, strict=True)
    )


def _rows(groups: Sequence[Group], weights_SV: FloatArray) -> tuple[Row, ...]:
    headlines = {
        id(entry): entry.evaluation.scores(weights_SV).headline() for group in groups for entry in group.entries
    }
    by_metric = {
        name: measure(groups, weights_SV, lambda entry, metric=name: headlines[id(entry)][metric])  # type: ignore[misc]
        for name in HEADLINE
    }
    return tuple(
        Row(
            name=group.name,
            method=group.method,
            runs=tuple(str(entry.run) for entry in group.entries),
            metrics={name: measured[index] for name, measured in by_metric.items()},
            costs=_mean_costs(group),
            detector=detector_in_words(group.entries[0].fingerprint),
            codec=group.entries[0].fingerprint.codec,
            head=tuple(_head(entry) for entry in group.entries),
        )
        for index, group in enumerate(groups)
    )


def _part_row(groups: Sequence[Group], part: Part, weights_SV: FloatArray) -> PartRow:
    measured = measure(groups, weights_SV, lambda entry: part.average_precision(entry.evaluation, weights_SV))
    return PartRow(kind=part.kind, name=part.name, num_objects=part.num_objects, groups=measured)


def _error_row(error: ErrorType, analyses: Sequence[Sequence[ErrorAnalysis]]) -> ErrorRow:
    weights = [[analysis.weights[error] for analysis in of_group] for of_group in analyses]
    return ErrorRow(
        error=error.value,
        counts=tuple(float(np.mean([weight.count for weight in of_group])) for of_group in weights),
        gains_ap50=tuple(float(np.mean([weight.gain_ap50 for weight in of_group])) for of_group in weights),
        gains_ap=tuple(float(np.mean([weight.gain_ap for weight in of_group])) for of_group in weights),
    )


def _false_alarms(
    groups: Sequence[Group], analyses: Sequence[Sequence[ErrorAnalysis]], min_score: float
) -> tuple[FalseAlarmRow, ...]:
    """Count background tracks by category, the most frequent first."""
    labels = groups[0].entries[0].labels
    counts_KG = np.zeros((len(labels.categories), len(groups)))
    for g, (group, of_group) in enumerate(zip(groups, analyses, strict=True)):
        for entry, analysis in zip(group.entries, of_group, strict=True):
            for index, error in analysis.false_alarms.items():
                track = entry.predictions[index]
                if error is ErrorType.background and track.score >= min_score:
                    counts_KG[labels.category_index[track.category_id], g] += 1 / len(group.entries)
    order = np.argsort(-counts_KG.sum(axis=1), kind="stable")
    return tuple(
        FalseAlarmRow(category=labels.categories[k].name, counts=tuple(counts_KG[k].tolist()))
        for k in order
        if counts_KG[k].any()
    )


def _mean_costs(group: Group) -> Costs:
    each = [asdict(entry.costs) for entry in group.entries]
    means = {name: _mean([costs[name] for costs in each]) for name in each[0]}
    return Costs(**means)  # type: ignore[arg-type]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _spread(values: FloatArray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 and not math.isnan(values[0]) else None


def _head(entry: Entry) -> str:
    if not entry.trained:
        return "no training"
    made = entry.provenance
    torch = made.get("libraries", {}).get("torch")
    parts = [f"seed {entry.settings.seed}", f"{entry.steps} steps", made.get("date"), made.get("host")]
    return ", ".join(part for part in [*parts, torch and f"torch {torch}"] if part)
