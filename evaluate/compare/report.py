"""A comparison as a console table, Markdown, JSON and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import FrameError
from cache.layout import write_file_atomically
from evaluate.compare.figure import intervals_svg
from evaluate.compare.groups import Group
from evaluate.compare.result import Comparison, Measured, Row
from evaluate.compare.videos import ChangedVideo
from evaluate.metrics.weighted import HEADLINE
from evaluate.pictures.overlays import (
    TRUTH,
    Strip,
    draw_strip,
    evenly,
    labelled_tracks,
    predicted_tracks,
    read_image,
)
from evaluate.pictures.page import render
from evaluate.score import percent
from train_head.data.video_sets import evaluation_split

FRAMES_PER_VIDEO = 4
_COSTS = ("trainable parameters", "training", "extraction", "cache", "inference")


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where a comparison was written."""

    html: Path
    markdown: Path
    json: Path


def write_comparison(comparison: Comparison, groups: Sequence[Group], folder: Path) -> Paths:
    """Write comparison.html, .md and .json into a folder. Without the data set's frames the page has no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = Paths(html=folder / "comparison.html", markdown=folder / "comparison.md", json=folder / "comparison.json")
    write_file_atomically(paths.json, json.dumps(comparison.to_json(), indent=1).encode())
    write_file_atomically(paths.markdown, markdown(comparison).encode())
    problem, sides = None, []
    try:
        sides = [_sides(groups, video, comparison.min_score) for video in comparison.changed]
    except FrameError as error:
        problem, sides = str(error), [[] for _ in comparison.changed]
    page = render(
        "compare/comparison.html.j2",
        c=comparison,
        headline=HEADLINE,
        figure=intervals_svg(comparison),
        cost_names=_COSTS,
        costs=[(row, cost_texts(row)) for row in comparison.rows],
        videos=list(zip(comparison.changed, sides, strict=True)),
        overlay_problem=problem,
    )
    write_file_atomically(paths.html, page.encode())
    return paths


def table(comparison: Comparison) -> str:
    """The headline for the console."""
    width = max(len(row.name) for row in comparison.rows) + 2
    lines = [" " * width + "".join(f"{name:>13}" for name in HEADLINE) + "   AP difference, 95 %, p"]
    for row in comparison.rows:
        cells = [_plain(row.metrics[name]).rjust(13) for name in HEADLINE]
        lines.append(f"{row.name:<{width}}{''.join(cells)}   {_difference(row.metrics['AP'])}")
    lines.append(f"split {comparison.split}, {comparison.num_videos} videos, {comparison.resamples} resamples")
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """All tables of the comparison; no pictures."""
    rows = comparison.rows
    names = [row.name for row in rows]
    lines = [f"# {' against '.join(names)}", ""]
    lines += [f"**Not on equal terms:** {warning}" for warning in comparison.warnings]
    lines += [f"Split {comparison.split}: {comparison.num_videos} videos, {comparison.num_objects} objects.", ""]
    lines += _table(
        ["group", "runs", *HEADLINE, "AP difference, 95 %, p"],
        [[r.name, len(r.runs), *(_plain(r.metrics[n]) for n in HEADLINE), _difference(r.metrics["AP"])] for r in rows],
    )
    lines += _table(["group", *_COSTS, "detector"], [[r.name, *cost_texts(r), r.detector] for r in rows])
    lines += _table(
        ["part", "objects", *names, *(f"{name}, difference" for name in names[1:])],
        [
            [f"{p.kind}: {p.name}", p.num_objects, *map(_plain, p.groups), *map(_difference, p.groups[1:])]
            for p in comparison.parts
        ],
    )
    lines += _table(
        ["error: number (AP50, AP gained)", *names],
        [
            [
                error.error,
                *(
                    f"{count:.0f} ({100 * gain50:+.1f}, {100 * gain:+.1f})"
                    for count, gain50, gain in zip(error.counts, error.gains_ap50, error.gains_ap, strict=True)
                ),
            ]
            for error in comparison.errors
        ],
    )
    lines += _table(
        [f"background tracks of score {comparison.min_score:g} or more, as", *names],
        [[row.category, *(f"{count:.1f}" for count in row.counts)] for row in comparison.false_alarms],
    )
    lines += _table(
        ["video", "share of the AP difference", "AP alone, first", "AP alone, second"],
        [[v.name, f"{100 * v.influence:+.2f}", percent(v.ap_first), percent(v.ap_group)] for v in comparison.changed],
    )
    return "\n".join(lines)


def cost_texts(row: Row) -> list[str]:
    """The costs in people's units, in the order of the tables' columns."""
    costs = row.costs
    return [
        f"{costs.trainable_parameters / 1e6:.2f} M",
        _seconds(costs.training_seconds),
        _seconds(costs.extraction_seconds),
        "–" if costs.cache_bytes is None else f"{costs.cache_bytes / 1e9:.2f} GB",
        _seconds(costs.inference_seconds),
    ]


def _sides(groups: Sequence[Group], video: ChangedVideo, min_score: float) -> list[Strip]:
    """Ground truth, first group, second group of one video."""
    first = groups[0].entries[0]
    folder = evaluation_split(first.settings)[1].frames
    content = first.labels.video_by_id[video.video_id]
    frames = evenly(content.length, FRAMES_PER_VIDEO)
    images = [read_image(folder, content, frame) for frame in frames]
    tracks = {TRUTH: labelled_tracks(first.labels, video.video_id)}
    for group in groups[:2]:
        entry = group.entries[0]
        tracks[group.name] = predicted_tracks(entry.labels, entry.predictions, video.video_id, min_score)
    return [draw_strip(title, drawn, images, frames) for title, drawn in tracks.items()]


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:], ""]


def _plain(measured: Measured) -> str:
    text = percent(measured.interval.value)
    return text if measured.spread is None else f"{text} ± {percent(measured.spread)}"


def _difference(measured: Measured) -> str:
    difference = measured.difference
    if difference is None:
        return "reference"
    inside, p = difference.interval, difference.p
    if inside.value is None or inside.low is None or inside.high is None or p is None:
        return "–"
    return f"{100 * inside.value:+.1f} ({100 * inside.low:+.1f} to {100 * inside.high:+.1f}), p {p:.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36_000 else f"{value / 3600:.1f} h"
