"""Gathers what the report of a run shows, and writes the page."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from cache.codecs.rate_distortion import read_calibration
from cache.errors import FrameError
from cache.fingerprint import Provenance
from cache.labels.tracks import Labels, Video
from configs.changes import changed_settings
from configs.schema import Settings
from evaluate.compare.runs import detector_in_words, num_parameters
from evaluate.metrics.weighted import HEADLINE
from evaluate.pictures.overlays import DrawnTrack, evenly, labelled_tracks, predicted_tracks
from evaluate.pictures.page import read_text, render
from evaluate.report import figures
from evaluate.report.precision_recall import precision_curves
from evaluate.report.scrubber import ScrubbedVideo, scrub_video, within_budget
from evaluate.report.sides import Scored, Side, read_sides, score_sides
from evaluate.report.similarity import SimilarityMatrix, similarity_matrix, video_of_many_objects
from evaluate.stored import HEAD
from evaluate.tables import stage_costs
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.data.video_sets import VideoSet, evaluation_split, open_evaluation_set
from train_head.run_folder import PROVENANCE, read_metrics_log

MIN_SCORE = 0.3  # tracks below it are not drawn
SCRIPT = "report/scrubber.js"


def write_report(settings: Settings, beside: Sequence[Path] = ()) -> Path:
    """Write `report.html` into the run's folder and return its path; `beside`: folders of other runs to show too.

    Without the data set's frames the page has no videos, and says so. Raises CacheError where the run is not
    evaluated yet, ConfigError where a run beside it was evaluated on other videos.
    """
    videos = open_evaluation_set(settings)
    sides = read_sides(settings, videos.labels, beside)
    scored = score_sides(sides)
    problem, scrubbed = None, list[ScrubbedVideo]()
    try:
        scrubbed = _scrubbed(settings, videos, sides)
    except FrameError as error:
        problem = str(error)
    matrices = _similarity(videos, sides)
    calibration = read_calibration(videos.feature_cache.path)
    script = read_text(SCRIPT)
    page = render(
        "report/report.html.j2",
        name=settings.name,
        facts=_facts(settings, videos, sides[0].run),
        costs=stage_costs(settings),
        headline=HEADLINE,
        scored=scored,
        categories=_categories(videos.labels, scored),
        figures=_figures(videos.labels, sides, scored, matrices),
        similarity=matrices,
        calibration=calibration,
        distortion=None if calibration is None else figures.rate_distortion(calibration),
        min_score=MIN_SCORE,
        videos=scrubbed,
        problem=problem,
        data={"videos": [asdict(video) for video in scrubbed]},
        changed=changed_settings(settings),
        settings=OmegaConf.to_yaml(OmegaConf.structured(settings)),
        provenance=_provenance(videos, sides),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = sides[0].run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _facts(settings: Settings, videos: VideoSet, run: Path) -> dict[str, str]:
    """The run in a few words."""
    labels, held = videos.labels, videos.feature_cache.fingerprint
    checkpoint = load_checkpoint(run / CHECKPOINT)
    objects = f", {len(labels.tracks)} objects" if labels.has_tracks else ", labels not public"
    return {
        "evaluated on": f"{videos.split}: {len(labels.videos)} videos{objects}, {len(labels.categories)} categories",
        "head": f"{num_parameters(checkpoint) / 1e6:.2f} M parameters, {checkpoint.step} steps "
        f"in {checkpoint.seconds:.0f} s, seed {settings.seed}",
        "detector": f"{'fine-tuned' if checkpoint.detector else 'frozen'}: {detector_in_words(held)}",
        "features": f"{videos.feature_cache.path}, codec {videos.feature_cache.root.codec_name}",
    }


def _categories(labels: Labels, scored: dict[str, Scored]) -> dict[str, list[float | None]]:
    """AP (fractions, None where there is nothing to find) by category and side."""
    values_NK = [[None if np.isnan(ap) else float(ap) for ap in of.categories_K] for of in scored.values()]
    names = [category.name for category in labels.categories]
    return {name: [values[k] for values in values_NK] for k, name in enumerate(names)} if scored else {}


def _figures(
    labels: Labels, sides: Sequence[Side], scored: dict[str, Scored], matrices: dict[str, SimilarityMatrix]
) -> dict[str, str]:
    found = {}
    logs = {side.run.name: log for side in sides if side.method == HEAD and (log := read_metrics_log(side.run))}
    if logs:
        found["learning"] = figures.learning_curves(logs)
    if scored:
        names = [category.name for category in labels.categories]
        found["categories"] = figures.category_bars(names, {title: of.categories_K for title, of in scored.items()})
        curves = {side.title: precision_curves(side.evaluation.matches) for side in sides if side.evaluation}
        found["precision"] = figures.precision_recall(curves)
    if matrices:
        found["similarity"] = figures.similarity_heat_maps(matrices)
    return found


def _similarity(videos: VideoSet, sides: Sequence[Side]) -> dict[str, SimilarityMatrix]:
    """Of every head, on the same video."""
    video = video_of_many_objects(videos.labels)
    found = {}
    for side in sides:
        if video is not None and side.method == HEAD:
            own = videos if side is sides[0] else open_evaluation_set(side.settings)
            matrix = similarity_matrix(side.settings, own, video)
            if matrix is not None:
                found[side.run.name] = matrix
    return found


def _scrubbed(settings: Settings, videos: VideoSet, sides: Sequence[Side]) -> list[ScrubbedVideo]:
    """`evaluate.report_videos` videos, spread over the split."""
    frames = evaluation_split(settings)[1].frames
    listed = videos.labels.videos
    chosen = [listed[index] for index in evenly(len(listed), settings.evaluate.report_videos)]
    return within_budget([scrub_video(video, frames, _drawn(videos.labels, sides, video)) for video in chosen])


def _drawn(labels: Labels, sides: Sequence[Side], video: Video) -> dict[str, list[DrawnTrack]]:
    truth = {"ground truth": labelled_tracks(labels, video.id)} if labels.has_tracks else {}
    return truth | {side.title: predicted_tracks(labels, side.predictions, video.id, MIN_SCORE) for side in sides}


def _provenance(videos: VideoSet, sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    """Where everything comes from: features, runs, this page."""
    found: dict[str, dict[str, Any]] = {"features": videos.feature_cache.fingerprint.to_json()}
    sessions = videos.feature_cache.root.sessions
    if sessions:
        found["extraction, last session"] = sessions[-1]
    for side in sides:
        path = side.run / PROVENANCE
        if side.method == HEAD and path.exists():
            found[f"training of {side.run.name}"] = json.loads(path.read_text())
    return found | {"this page": asdict(Provenance.gather())}
