"""The report of a run: one self-contained HTML page with metrics, curves and overlays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from cache.errors import CacheError
from cache.labels import Labels, Video
from configs.schema import Settings
from configs.splits import train_split, valid_split
from evaluate.curves import loss_curves_svg
from evaluate.overlays import Strip, draw_strip, labelled_tracks, predicted_tracks, read_image
from evaluate.page import render
from evaluate.results import TrackPrediction
from evaluate.stored import load_predictions, stored_methods
from evaluate.tables import HEADLINE, percent, read_metrics, stage_costs
from train_head.data import open_evaluation_set
from train_head.run_folder import read_metrics_log

FRAMES_PER_VIDEO = 8
MIN_SCORE = 0.3  # tracks below it are not drawn


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
    page = render(
        "report.html.j2",
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
    strips = [draw_strip(title, tracks, images, frames) for title, tracks in drawn.items()]
    return VideoStrips(name=video.name, frames=frames, strips=strips)
