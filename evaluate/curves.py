"""Learning curves as SVG, to stand inside the report."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TERMS = ("class", "mask", "dice", "similarity")


def loss_curves_svg(log: Sequence[dict[str, float]]) -> str:
    """Draw the total loss and the final layer's terms over steps; the <svg> element, without an XML header."""
    log = [entry for entry in log if "loss" in entry]
    steps = [entry["step"] for entry in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(steps, [entry["loss"] for entry in log], color="#0a6ebd")
    left.set_title("total loss")
    for term in TERMS:
        right.plot(steps, [entry[term] for entry in log], label=term)
    right.set_title("terms, last decoder layer, unweighted")
    right.set_yscale("log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
