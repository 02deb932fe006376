"""`python -m evaluate score`: AP and AR of any result file on any YTVIS label file, without a config."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from cache.labels.annotations import load_labels
from cache.layout import write_file_atomically
from evaluate.metrics.video_ap import VideoMetrics, evaluate_tracks
from evaluate.metrics.weighted import HEADLINE
from evaluate.results import load_results

BREAKDOWN = ("APs", "APm", "APl", "AR100", "ARs", "ARm", "ARl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("--annotations", type=Path, required=True, help="labels in YTVIS JSON")
    parser.add_argument("--predictions", type=Path, required=True, help="results.json, or the zip that holds it")
    parser.add_argument("--output", type=Path, help="write the metrics here too (JSON, fractions in [0, 1])")


def run(args: argparse.Namespace) -> int:
    """Score and print the tables; the exit status."""
    print(format_table(score(args.annotations, args.predictions, args.output)))
    return 0


def score(annotations: Path, predictions: Path, output: Path | None = None) -> VideoMetrics:
    """Score a result file; `output`, where given, gets the metrics as JSON. Raises AnnotationError."""
    labels = load_labels(annotations)
    metrics = evaluate_tracks(labels, load_results(predictions, labels))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(output, (json.dumps(metrics.to_json(), indent=2) + "\n").encode())
    return metrics


def format_table(metrics: VideoMetrics) -> str:
    """The numbers x 100 with one decimal, `–` where undefined; then the AP of each category."""
    values = metrics.to_json()
    lines = []
    for names in (HEADLINE, BREAKDOWN):
        lines.append("".join(f"{name:>8}" for name in names))
        lines.append("".join(f"{percent(values[name]):>8}" for name in names))
        lines.append("")
    width = max(len(name) for name in ("category", *metrics.per_category)) + 2
    lines.append(f"{'category':<{width}}{'AP':>6}")
    lines += [f"{name:<{width}}{percent(value):>6}" for name, value in metrics.per_category.items()]
    return "\n".join(lines)


def percent(value: object) -> str:
    """A fraction as a percentage with one decimal, `–` where undefined (None, NaN)."""
    return f"{100 * value:.1f}" if isinstance(value, int | float) and not math.isnan(value) else "–"
