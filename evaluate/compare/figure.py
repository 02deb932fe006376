"""The figure of a comparison: AP and paired differences with intervals, as SVG in the page's colours."""

from __future__ import annotations

import numpy as np

from evaluate.compare.result import Comparison
from evaluate.metrics.bootstrap import Interval
from evaluate.pictures.charts import drawing, page_svg, panels, short_name


def intervals_svg(comparison: Comparison) -> str:
    """Draw the <svg> element: AP of every group on the left, differences to the first on the right."""
    aps = [row.metrics["AP"] for row in comparison.rows]
    names = [short_name(row.name, 34) for row in comparison.rows]
    intervals: dict[str, list[Interval | None]] = {
        "AP": [ap.interval for ap in aps],
        f"AP less {names[0]}": [ap.difference.interval if ap.difference else None for ap in aps],
    }
    places = np.arange(len(names))
    with drawing():
        figure, axes = panels(2, 10, 0.7 + 0.35 * len(names))
        for part, (title, of_rows) in zip(axes, intervals.items(), strict=True):
            ends = [(i.low, i.value, i.high) if i else (None, None, None) for i in of_rows]
            low, value, high = 100 * np.array(ends, dtype=np.float64).T  # None becomes NaN, which is not drawn
            part.hlines(places, low, high, color="C0", linewidth=3)
            part.plot(value, places, "o", color="C0")
            part.axvline(0, color="C1", linestyle="--", linewidth=1)
            part.set_title(title)
            part.set_yticks(places, names if part is axes[0] else [])
            part.set_ylim(len(names) - 0.5, -0.5)
            part.grid(axis="y", visible=False)
        return page_svg(figure)
