"""How figures are drawn: for the report as SVG in the page's own colours, for papers as PNG, SVG or PDF."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

COLOURS = ("#2f7ed8", "#d9752b", "#2f9e62", "#b6559a", "#94812a", "#7a72d6", "#c4544c", "#3a97a4")
"""Of lines and bars, by turns: between light and dark, so that they stand out from either background."""
_INK = "#010203"  # stands for the page's text colour
_STYLE: Any = {
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.prop_cycle": cycler(color=COLOURS), "axes.axisbelow": True, "axes.grid": True,
    "grid.color": "#888888", "grid.alpha": 0.3, "font.size": 10, "axes.titlesize": 10, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "vita-cache",
    "text.parse_math": False,  # a category may be called $x$
}  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """The style; whatever draws or saves a figure stands inside."""
    with matplotlib.rc_context(_STYLE):
        yield


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Open a figure (inches) of some axes side by side; must stand inside `drawing`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def short_name(name: str, longest: int = 24) -> str:
    """A name of at most so many characters, which leaves room for the figure beside it."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def page_svg(figure: Figure) -> str:
    """The <svg> element of a figure: text stays text, ink takes the colour of the text around it."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # of scripts that matplotlib has no font for: the browser draws them
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # ids would repeat in a page of many figures
    text = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(_INK, "currentColor")


def save(figure: Figure, path: Path) -> None:
    """Write a figure on white, in the format that the path's ending names; PNG with 300 dots an inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=300, facecolor="white", bbox_inches="tight")
