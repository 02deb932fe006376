"""The report of a run: one self-contained HTML page with metrics, curves and overlays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from cache.errors import CacheError
from cache.labels import Labels, Video
from configs.schema import Settings
from configs.splits import train_split, valid_split
from evaluate.curves import loss_curves_svg
from evaluate.overlays import (
    PALETTE,
    DrawnTrack,
    draw_frame,
    jpeg_data_url,
    labelled_tracks,
    predicted_tracks,
    read_image,
)
from evaluate.results import TrackPrediction
from evaluate.stored import load_predictions, stored_methods
from evaluate.tables import HEADLINE, percent, read_metrics, stage_costs
from train_head.data import open_evaluation_set
from train_head.run_folder import read_metrics_log

FRAMES_PER_VIDEO = 8
MIN_SCORE = 0.3  # tracks below it are not drawn
_TEMPLATE = Path(__file__).parent / "report.html.j2"


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of pictures of a video: who drew it, its tracks' captions with their colours, its frames."""

    title: str
    legend: list[tuple[str, str]]
    pictures: list[str]


@dataclass(frozen=True, kw_only=True)
class VideoStrips:
    """The rows of one video."""

    name: str
    frames: list[int]
    strips: list[Strip]


def write_report(settings: Settings) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Raises CacheError where the run is not evaluated yet, FrameError where the data set's frames are missing.
    """
    run = Path(settings.runs) / settings.name
    metrics = read_metrics(run)
    if not (run / "results.json").exists():
        raise CacheError("nothing to report yet", where=run, hint="`make evaluate` with the same config comes first")
    log = read_metrics_log(run)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text()).render(
        name=settings.name,
        headline=HEADLINE,
        rows={method: [percent(values[key]) for key in HEADLINE] for method, values in metrics.items()},
        categories=_category_rows(metrics),
        costs=stage_costs(settings),
        curves=loss_curves_svg(log) if log else None,
        videos=_video_strips(settings, run),
        split=next((values["split"] for values in metrics.values()), settings.evaluate.split.value),
        settings=OmegaConf.to_yaml(OmegaConf.structured(settings)),
        fingerprint=next((values["fingerprint"] for values in metrics.values()), {}),
    )
    path = run / "report.html"
    path.write_text(page)
    return path


def _category_rows(metrics: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    names = list(next(iter(metrics.values()))["per_category"]) if metrics else []
    return {name: [percent(values["per_category"][name]) for values in metrics.values()] for name in names}


def _video_strips(settings: Settings, run: Path) -> list[VideoStrips]:
    """Draw the first `evaluate.report_videos` videos of the split, spread over it."""
    videos = open_evaluation_set(settings)
    paths = valid_split(settings) if videos.split == "valid" else train_split(settings)
    assert paths is not None
    labels = videos.labels
    predictions = {method: load_predictions(run, method, labels) for method in stored_methods(run)}
    count = min(settings.evaluate.report_videos, len(labels.videos))
    chosen = [labels.videos[index] for index in np.linspace(0, len(labels.videos) - 1, count).astype(int)]
    return [_draw_video(labels, video, predictions, paths.frames) for video in chosen]


def _draw_video(
    labels: Labels, video: Video, predictions: dict[str, list[TrackPrediction]], folder: Path
) -> VideoStrips:
    frames = np.unique(np.linspace(0, video.length - 1, min(FRAMES_PER_VIDEO, video.length)).astype(int)).tolist()
    images = [read_image(folder, video, frame) for frame in frames]
    drawn = {"ground truth": labelled_tracks(labels, video.id)} if labels.has_tracks else {}
    for method, found in predictions.items():
        drawn[method] = predicted_tracks(labels, found, video.id, MIN_SCORE)
    strips = [_strip(title, tracks, images, frames) for title, tracks in drawn.items()]
    return VideoStrips(name=video.name, frames=frames, strips=strips)


def _strip(
    title: str, tracks: Sequence[DrawnTrack], images: Sequence[NDArray[np.uint8]], frames: Sequence[int]
) -> Strip:
    colours = ["#{:02x}{:02x}{:02x}".format(*PALETTE[index % len(PALETTE)]) for index in range(len(tracks))]
    return Strip(
        title=title,
        legend=[(track.caption, colour) for track, colour in zip(tracks, colours, strict=True)],
        pictures=[jpeg_data_url(draw_frame(image, tracks, frame)) for image, frame in zip(images, frames, strict=True)],
    )
