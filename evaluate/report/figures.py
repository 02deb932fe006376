"""The report's figures, each an <svg> element in the page's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from cache.codecs.rate_distortion import Calibration
from evaluate.metrics.weighted import RECALLS, THRESHOLDS, FloatArray
from evaluate.pictures.charts import drawing, page_svg, panels, short_name
from evaluate.report.similarity import SimilarityMatrix

Log = Sequence[Mapping[str, float]]
TERMS = ("class", "mask", "dice", "similarity")
PRECISIONS = {"IoU 0.50": slice(0, 1), "IoU 0.75": slice(5, 6), "mean, IoU 0.50 to 0.95": slice(0, len(THRESHOLDS))}
_MOST_POINTS = 400  # of a curve; the steps between are averaged


def learning_curves(logs: Mapping[str, Log], colours: Mapping[str, str]) -> str:
    """Loss of every run, the first run's terms, and AP where it was evaluated while training.

    `colours`: of the runs, as in the other figures.
    """
    first = next(iter(logs.values()))
    evaluated = {name: [entry for entry in log if "AP" in entry] for name, log in logs.items()}
    with drawing():
        figure, axes = panels(3 if any(evaluated.values()) else 2, 10, 3)
        for name, log in logs.items():
            _draw(axes[0], _curve(log, "loss"), label=name, color=colours[name])
        for term in TERMS:
            _draw(axes[1], _curve(first, term), label=term)
        axes[0].set_title("total loss")
        axes[1].set_title(f"terms of {next(iter(logs))}, last decoder layer")
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter(_plain)
        axes[1].yaxis.set_minor_formatter(NullFormatter())
        for name, log in evaluated.items() if len(axes) == 3 else ():
            steps, aps = [entry["step"] for entry in log], [100 * entry["AP"] for entry in log]
            axes[2].plot(steps, aps, marker="o", label=name, color=colours[name])
            axes[2].set_title("AP while training")
        for part in axes:
            part.set_xlabel("step")
            part.legend()
        return page_svg(figure)


def _draw(axes: Axes, curve: tuple[FloatArray, FloatArray], label: str, color: str | None = None) -> None:
    """A line; a dot where there is one point, which a line would not show."""
    axes.plot(*curve, marker="o" if len(curve[0]) == 1 else "", label=label, color=color)


def _plain(value: float, _: object = None) -> str:
    """Numbers on logarithmic axes; matplotlib would write powers as formulas."""
    return f"{value:g}"


def _curve(log: Log, key: str) -> tuple[FloatArray, FloatArray]:
    """Steps and values of a key, averaged in groups down to _MOST_POINTS."""
    points = np.array([(entry["step"], entry[key]) for entry in log if key in entry], dtype=np.float64).reshape(-1, 2)
    groups = np.array_split(points, _MOST_POINTS) if len(points) > _MOST_POINTS else points[:, None]
    steps, values = np.array([group.mean(axis=0) for group in groups]).reshape(-1, 2).T
    return steps, values


def category_bars(names: Sequence[str], values: Mapping[str, FloatArray]) -> str:
    """AP (fractions, NaN where there is nothing to find) of every category by method."""
    thick = 0.8 / len(values)
    with drawing():
        figure, (axes,) = panels(1, 10, 0.7 + len(names) * max(0.24, 0.13 * len(values)))
        for index, (method, aps) in enumerate(values.items()):
            axes.barh(np.arange(len(names)) + (index - (len(values) - 1) / 2) * thick, 100 * aps, thick, label=method)
        axes.set_yticks(range(len(names)), [short_name(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("AP")
        axes.legend(loc="lower right")
        return page_svg(figure)


def precision_recall(curves: Mapping[str, FloatArray]) -> str:
    """Precision (T, R) by method at IoU 0.5, at 0.75, and the mean over all thresholds."""
    with drawing():
        figure, axes = panels(len(PRECISIONS), 10, 3.2 + 0.2 * len(curves))
        for part, (title, thresholds) in zip(axes, PRECISIONS.items(), strict=True):
            for method, curve_TR in curves.items():
                mean_R = curve_TR[thresholds].mean(axis=0)
                part.plot(100 * RECALLS, 100 * mean_R, label=f"{method} {100 * mean_R.mean():.1f}")
            part.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 100), ylim=(0, 102))
            part.legend(title="area", loc="upper center", bbox_to_anchor=(0.5, -0.22))
        return page_svg(figure)


def similarity_heat_maps(matrices: Mapping[str, SimilarityMatrix]) -> str:
    """One heat map a run, rows and columns in blocks of one object."""
    rows = max(len(matrix.values_FM) for matrix in matrices.values())
    with drawing():
        figure, axes = panels(len(matrices), 10, float(np.clip(0.045 * rows, 4.4, 6)))
        for part, (name, matrix) in zip(axes, matrices.items(), strict=True):
            values = matrix.values_FM
            image = part.imshow(values, aspect="auto", cmap="viridis", vmin=0 if matrix.trained else None, vmax=1)
            counts = np.bincount(matrix.row_objects_F, minlength=len(matrix.objects))
            ends = counts.cumsum()
            objects = [short_name(name, 24 // min(3, len(matrices))) for name in matrix.objects]
            part.set_yticks(ends - counts / 2 - 0.5, objects)
            part.set_xticks(range(values.shape[1]), [objects[k] for k in matrix.column_objects_M], rotation=45)
            for end in ends[:-1]:
                part.axhline(end - 0.5, color="white", linewidth=1)
            part.grid(visible=False)
            part.set(title=f"{short_name(name)}\n{100 * matrix.agreement:.0f} % agree", xlabel="video query of")
            label = "probability of one object" if matrix.trained else "cosine (no similarity loss)"
            figure.colorbar(image, ax=part, label=label)
        axes[0].set_ylabel("frame queries of, frame by frame")
        return page_svg(figure)


def rate_distortion(calibration: Calibration) -> str:
    """What each codec costs and what it leaves of the detector's masks; the cache's own is ringed."""
    with drawing():
        figure, (axes,) = panels(1, 10, 3.4)
        located = all(row.bytes_per_location for row in calibration.rows)
        sizes = [row.bytes_per_location if located else row.bytes_per_frame / 1e6 for row in calibration.rows]
        losses = [1 - row.mask_iou for row in calibration.rows]
        axes.scatter(sizes, losses)
        chosen = calibration.chosen
        axes.scatter(
            sizes[chosen], losses[chosen], s=160, facecolors="none", edgecolors="C1", label="used by this cache"
        )
        for row, size, loss in zip(calibration.rows, sizes, losses, strict=True):
            axes.annotate(row.label, (size, loss), xytext=(5, 5), textcoords="offset points", rotation=30)
        axes.axhline(1 - calibration.min_mask_iou, color="C1", linestyle="--", label="cache.min_mask_iou")
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(0, 3 * max(losses))  # room for the names
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_plain)
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bytes a map location, mask features" if located else "MB a frame")
        axes.set_ylabel("mask IoU lost")
        axes.legend()
        return page_svg(figure)
