"""`python -m evaluate plot`: the paper's figures from finished runs, as PNG, SVG or PDF."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cache.errors import CacheError, ConfigError
from evaluate.compare.groups import runs_of
from evaluate.metrics.weighted import FloatArray
from evaluate.pictures.charts import drawing, panels, save
from evaluate.score import percent
from train_head.run_folder import read_metrics_log

_FORMATS = (".png", ".svg", ".pdf")
AXES = {"windows": "Encoder window (frames)", "pruning": "Share of frame queries kept"}


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """A number at several places (steps, variants) from several runs of one kind."""

    name: str
    places: tuple[Any, ...]
    values_RP: FloatArray  # runs x places

    @property
    def mean_P(self) -> FloatArray:  # noqa: N802  # shape suffix
        """Mean over runs."""
        return np.asarray(self.values_RP.mean(axis=0))

    @property
    def std_P(self) -> FloatArray:  # noqa: N802  # shape suffix
        """Standard deviation over runs; 0 for one run."""
        if len(self.values_RP) == 1:
            return np.zeros(len(self.places))
        return np.asarray(self.values_RP.std(axis=0, ddof=1))


def plot(what: str, sources: Sequence[str], output: Path, low: str | None = None, high: str | None = None) -> Path:
    """Draw convergence (VITA, Fig. 5), windows, pruning or gap, write it to `output` and return that.

    `sources`: of gap one comparison.json, of all else `name=run,run,pattern*` or folders of runs. `low`, `high`: of
    gap, the rows that stand for 0 and 100 %; by default the first, and the one of highest AP. Raises ConfigError for
    an unknown ending or row, or words that this plot has no use for, CacheError where runs lack what is drawn.
    """
    if output.suffix not in _FORMATS:
        raise ConfigError("no such format", where=output, expected=" ".join(_FORMATS), got=output.suffix)
    if what == "gap" and len(sources) != 1:
        raise ConfigError("a gap is of one comparison", where="plot gap", got=f"{len(sources)}: {' '.join(sources)}")
    if what != "gap" and (low or high):
        raise ConfigError("--low and --high are for the gap alone", where=f"plot {what}")
    with drawing():
        if what == "gap":
            figure = _gap(Path(sources[0]), low, high)
        elif what == "convergence":
            figure = convergence([read_convergence(source) for source in sources])
        else:
            read = [read_ablation(source, what) for source in sources]
            quantities = {"AP": [aps for aps, _ in read], "Frames per second": [speeds for _, speeds in read]}
            figure = variants(quantities, AXES[what])
        save(figure, output)
    return output


def convergence(groups: Sequence[Seeds]) -> Figure:
    """AP over training steps, mean ± standard deviation over seeds (VITA, Fig. 5)."""
    figure, (axes,) = panels(1, 5, 3.2)
    for group in groups:
        mean_P, std_P = 100 * group.mean_P, 100 * group.std_P
        (line,) = axes.plot(group.places, mean_P, marker="o", markersize=3, label=_label(group))
        axes.fill_between(group.places, mean_P - std_P, mean_P + std_P, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="Training step", ylabel="AP", xlim=(0, None), ylim=(0, None))
    axes.legend()
    return figure


def variants(groups: Mapping[str, Sequence[Seeds]], xlabel: str) -> Figure:
    """One panel for each quantity (AP, frames per second) over the variants of an ablation."""
    figure, axes = panels(len(groups), 4.2 * len(groups), 3)
    for part, (quantity, of_quantity) in zip(axes, groups.items(), strict=True):
        for group in of_quantity:
            part.errorbar(group.places, group.mean_P, group.std_P, marker="o", capsize=3, label=_label(group))
        part.set(xlabel=xlabel, ylabel=quantity)
        if quantity != "AP":
            part.set_ylim(bottom=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(names)))
    return figure


def gap(rows: Mapping[str, tuple[float, float]], low: str, high: str) -> Figure:
    """How much of the difference in AP between two rows every other closes, in percent; rows: AP and its spread."""
    bottom, width = rows[low][0], rows[high][0] - rows[low][0]
    shown = {name: row for name, row in rows.items() if name not in (low, high)}
    figure, (axes,) = panels(1, 5.5, 0.9 + 0.4 * len(shown))
    closed = [100 * (ap - bottom) / width for ap, _ in shown.values()]
    axes.barh(list(shown), closed, xerr=[100 * abs(spread / width) for _, spread in shown.values()], capsize=3)
    axes.axvline(100, linestyle="--", color="C1", label=f"{high}: AP {100 * rows[high][0]:.1f}")
    axes.axvline(0, linestyle=":", color="C1", label=f"{low}: AP {100 * bottom:.1f}")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="Gap in AP closed (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.25 - 0.6 / (1 + len(shown))), ncols=2)
    return figure


def _label(group: Seeds) -> str:
    count = len(group.values_RP)
    return group.name if count == 1 else f"{group.name} ({count} seeds)"


def read_convergence(source: str) -> Seeds:
    """AP entries of metrics.jsonl of the runs, at the steps that all of them have. Raises CacheError without any."""
    name, runs = _runs(source)
    logged = [{int(e["step"]): e["AP"] for e in read_metrics_log(run) if "AP" in e} for run in runs]
    steps = sorted(set.intersection(*(set(of_run) for of_run in logged)))
    if not steps:
        raise CacheError(
            "no AP while training is logged, or at no common step",
            where=", ".join(str(run) for run in runs),
            hint="train with train.evaluate_every=N",
        )
    values = np.array([[of_run[step] for step in steps] for of_run in logged])
    return Seeds(name=name, places=tuple(steps), values_RP=values)


def read_ablation(source: str, what: str) -> tuple[Seeds, Seeds]:
    """AP x 100 (NaN where undefined) and frames per second by variant, from `ablate_<what>.json` of the runs.

    Places are the numbers that the variants end with; `all` frames of a window stand in words. Raises CacheError.
    """
    name, runs = _runs(source)
    tables = []
    for folder in runs:
        path = folder / f"ablate_{what}.json"
        if not path.exists():
            raise CacheError("no such ablation", where=path, hint=f"`python -m evaluate ablate {what} CONFIG` measures")
        tables.append(json.loads(path.read_text())["rows"])
    ends = tuple(row["variant"].split()[-1] for row in tables[0])  # of "W = 3", "kept 0.75"
    if any(tuple(row["variant"].split()[-1] for row in rows) != ends for rows in tables):
        raise CacheError("the runs of one line have other variants", where=source, hint="measure them again, alike")
    places = tuple(map(float, ends)) if what == "pruning" else ends
    aps = 100 * np.array([[row["metrics"]["AP"] for row in rows] for rows in tables], dtype=np.float64)
    speeds = np.array([[row["frames_per_second"] for row in rows] for rows in tables])
    return Seeds(name=name, places=places, values_RP=aps), Seeds(name=name, places=places, values_RP=speeds)


def _runs(source: str) -> tuple[str, list[Path]]:
    name, runs = runs_of(source)
    missing = [run for run in runs if not run.is_dir()]
    if missing or not runs:
        raise CacheError("no such run", where=missing[0] if missing else source)
    return name or runs[0].name, runs


def read_gap(path: Path) -> dict[str, tuple[float, float]]:
    """AP (NaN where undefined) and its spread over seeds by row of a comparison. Raises CacheError for another file."""
    try:
        rows = json.loads(path.read_text())["rows"]
        aps = {row["name"]: row["metrics"]["AP"] for row in rows}
        values = {name: ap["interval"]["value"] for name, ap in aps.items()}
        return {
            name: (math.nan if values[name] is None else float(values[name]), float(ap["spread"] or 0.0))
            for name, ap in aps.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "`python -m evaluate compare RUNS --output FOLDER` writes one"
        raise CacheError("not a comparison.json", where=path, got=repr(error), hint=hint) from error


def _gap(path: Path, low: str | None, high: str | None) -> Figure:
    rows = read_gap(path)
    bottom = low or next(iter(rows))
    top = high or max(rows, key=lambda name: np.nan_to_num(rows[name][0], nan=-1.0))
    for name in (bottom, top):
        if name not in rows:
            raise ConfigError("no such row", where=path, expected=", ".join(rows), got=name)
    if not abs(rows[top][0] - rows[bottom][0]) > 0:  # nor where one is undefined
        got = ", ".join(f"AP {percent(rows[name][0])} of {name}" for name in (bottom, top))
        raise ConfigError("there is no gap", where=path, got=got)
    return gap(rows, bottom, top)
