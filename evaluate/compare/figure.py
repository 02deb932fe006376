"""The figure of a comparison: AP and paired differences with intervals, as SVG in the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from evaluate.compare.result import Comparison
from evaluate.metrics.bootstrap import Interval
from evaluate.pictures.page import render

_LEFT, _RIGHT = (260, 540), (600, 880)  # where the two axes lie, in the units of the drawing
_MAX_NAME = 34  # characters that fit beside the axes


@dataclass(frozen=True, kw_only=True)
class _Tick:
    x: float
    text: str


@dataclass(frozen=True, kw_only=True)
class _Axis:
    title: str
    ticks: tuple[_Tick, ...]


@dataclass(frozen=True, kw_only=True)
class _Bar:
    low: float
    value: float
    high: float


@dataclass(frozen=True, kw_only=True)
class _Line:
    name: str
    bars: tuple[_Bar, ...]


def intervals_svg(comparison: Comparison) -> str:
    """Draw the <svg> element: AP of every group on the left, differences to the first on the right."""
    aps = [row.metrics["AP"] for row in comparison.rows]
    left = _Scale([ap.interval for ap in aps], _LEFT)
    right = _Scale([ap.difference.interval for ap in aps if ap.difference is not None], _RIGHT)
    lines = []
    for row, ap in zip(comparison.rows, aps, strict=True):
        bars = [left.bar(ap.interval), right.bar(ap.difference.interval) if ap.difference else None]
        name = row.name if len(row.name) <= _MAX_NAME else row.name[: _MAX_NAME - 1] + "…"
        lines.append(_Line(name=name, bars=tuple(bar for bar in bars if bar is not None)))
    return render(
        "compare/comparison.svg.j2",
        lines=lines,
        axes=[left.axis("AP"), right.axis(f"AP less {comparison.rows[0].name}")],
        label="AP of each group and its difference to the first, with 95 % intervals, as in the table above",
    )


class _Scale:
    """Maps numbers (times 100) to places on one axis, which holds zero and all intervals."""

    def __init__(self, intervals: Sequence[Interval], span: tuple[int, int]) -> None:
        ends = [100 * end for i in intervals for end in (i.low, i.high, i.value) if end is not None]
        self.ticks = np.asarray(
            MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(min([0, *ends]), max([1, *ends]))
        )
        self.span = span

    def place(self, value: float) -> float:
        return round(float(np.interp(value, (self.ticks[0], self.ticks[-1]), self.span)), 1)

    def bar(self, interval: Interval) -> _Bar | None:
        if interval.value is None or interval.low is None or interval.high is None:
            return None
        low, value, high = (self.place(100 * number) for number in (interval.low, interval.value, interval.high))
        return _Bar(low=low, value=value, high=high)

    def axis(self, title: str) -> _Axis:
        ticks = [_Tick(x=self.place(tick), text=f"{tick:g}".replace("-", "−")) for tick in self.ticks.tolist()]
        return _Axis(title=title, ticks=tuple(ticks))
