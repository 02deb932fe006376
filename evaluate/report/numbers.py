"""The numbers behind the report's figures as tables, for those who do not see the figures or want to copy from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cache.codecs.rate_distortion import Calibration, Distortion
from evaluate.metrics.weighted import RECALLS, FloatArray
from evaluate.pictures.overlays import evenly
from evaluate.report.figures import PRECISIONS, TERMS, Log
from evaluate.score import percent

_MOST_ROWS = 12  # of a curve


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A table: what it shows, the heads of its columns (the first is of the rows' heads), its rows by their heads."""

    caption: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[str]]


def learning(logs: Mapping[str, Log]) -> Numbers:
    """Every run's loss, the first one's terms and every run's AP, at some of the logged steps."""
    first, first_log = next(iter(logs.items()))
    columns = [(f"loss, {name}", log, "loss", 1) for name, log in logs.items()]
    columns += [(f"{term}, {first}", first_log, term, 1) for term in TERMS]
    columns += [(f"AP, {name}", log, "AP", 100) for name, log in logs.items() if any("AP" in entry for entry in log)]
    evaluated = sorted({entry["step"] for log in logs.values() for entry in log if "AP" in entry})
    steps = sorted({*_some([entry["step"] for entry in first_log if "loss" in entry]), *_some(evaluated)})
    values = [{entry["step"]: factor * entry[key] for entry in log if key in entry} for _, log, key, factor in columns]
    return Numbers(
        caption="Losses and AP over steps",
        columns=("step", *(title for title, *_ in columns)),
        rows={f"{step:.0f}": [f"{of[step]:.3g}" if step in of else "–" for of in values] for step in steps},
    )


def _some(steps: Sequence[float]) -> list[float]:
    return [steps[index] for index in evenly(len(steps), _MOST_ROWS)]


def precision(curves: Mapping[str, FloatArray]) -> Numbers:
    """Precision (T, R) of every method at every tenth recall, at the IoUs of the figure."""
    shown = [(f"{name}, {title}", curve_TR[part].mean(axis=0))
             for name, curve_TR in curves.items() for title, part in PRECISIONS.items()]  # fmt: skip
    return Numbers(
        caption="Precision by recall",
        columns=("recall", *(title for title, _ in shown)),
        rows={f"{100 * RECALLS[r]:.0f}": [percent(mean_R[r]) for _, mean_R in shown] for r in range(0, 101, 10)},
    )


def categories(names: Sequence[str], values: Mapping[str, FloatArray]) -> Numbers:
    """AP (fractions, NaN where there is nothing to find) of every category by method."""
    return Numbers(
        caption="AP by category",
        columns=("category", *values),
        rows={name: [percent(aps_K[k]) for aps_K in values.values()] for k, name in enumerate(names)},
    )


def codecs(calibration: Calibration) -> Numbers:
    """The rate-distortion table."""
    return Numbers(
        caption=f"Codecs on {calibration.held_out_frames} held-out frames",
        columns=(
            *("codec", "bytes a frame", "bytes a location", "feature error", "logit error"),
            *("mask IoU", "5th percentile", "ms to encode", "ms to decode"),
        ),
        rows={
            f"{row.label} (used)" if index == calibration.chosen else row.label: list(_costs_and_errors(row))
            for index, row in enumerate(calibration.rows)
        },
    )


def _costs_and_errors(row: Distortion) -> Iterable[str]:
    yield f"{row.bytes_per_frame:,.0f}"
    yield f"{row.bytes_per_location:.0f}" if row.bytes_per_location else "–"
    yield from (f"{value:.4f}" for value in (row.feature_error, row.logit_error, row.mask_iou, row.mask_iou_p5))
    yield from (f"{value:.2f}" for value in (row.encode_ms, row.decode_ms))
