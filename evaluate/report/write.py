"""Gathers what the report of a run shows, and writes the page."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cache.codecs.rate_distortion import Calibration, read_calibration
from cache.errors import FrameError, shown
from cache.fingerprint import Provenance
from cache.labels.tracks import Labels, Video
from cache.layout import write_file_atomically
from configs.changes import changed_settings, in_yaml
from configs.schema import CheckpointChoice, Settings
from evaluate.compare.runs import detector_in_words, num_parameters
from evaluate.metrics.weighted import HEADLINE, precision_curves
from evaluate.pictures.charts import COLOURS
from evaluate.pictures.overlays import MIN_SCORE, TRUTH, DrawnTrack, evenly, labelled_tracks, predicted_tracks
from evaluate.pictures.page import read_text, render
from evaluate.report import figures, numbers
from evaluate.report.scrubber import ScrubbedVideo, scrub_video, within_budget
from evaluate.report.sides import Scored, Side, read_sides, score_sides
from evaluate.report.similarity import SimilarityMatrix, similarity_matrix, video_of_many_objects
from evaluate.stored import HEAD, as_evaluated, load_metrics, methods_left_out
from evaluate.tables import stage_costs
from train_head.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint
from train_head.data.video_sets import VideoSet, evaluation_split, open_evaluation_set
from train_head.run_folder import PROVENANCE, read_metrics_log

SCRIPT = "report/scrubber.js"


def write_report(settings: Settings, beside: Sequence[Path] = (), methods: Sequence[str] | None = None) -> Path:
    """Write `report.html` into the run's folder and return its path; `beside`: folders of other runs to show too.

    `methods`: what to show beside the head, by default the baseline. Without the data set's frames the page has no
    videos, and says so. Raises CacheError where the run is not evaluated yet, ConfigError where a run beside it was
    evaluated on other videos.
    """
    settings = as_evaluated(settings, Path(settings.runs) / settings.name, HEAD)
    videos = open_evaluation_set(settings)
    sides = read_sides(settings, videos, beside, methods)
    problem, scrubbed = None, list[ScrubbedVideo]()
    try:
        scrubbed = _scrubbed(settings, videos, sides)
    except FrameError as error:
        problem = str(error)
    matrices = _similarity(videos, sides)
    calibration = read_calibration(videos.feature_cache.path)
    scored = score_sides(sides)
    drawn, tables = _figures(videos.labels, sides, scored, matrices, calibration)
    script = read_text(SCRIPT)
    page = render(
        "report/report.html.j2",
        name=settings.name,
        facts=_facts(settings, videos, sides[0].run),
        costs=stage_costs(settings),
        headline=HEADLINE,
        scored=scored,
        left_out=methods_left_out(sides[0].run, videos.split),
        figures=drawn,
        numbers=tables,
        similarity=matrices,
        min_score=MIN_SCORE,
        videos=scrubbed,
        problem=problem,
        data={"videos": [asdict(video) for video in scrubbed]},
        changed={key: in_yaml(value) for key, value in changed_settings(settings).items()},
        settings=OmegaConf.to_yaml(OmegaConf.structured(settings)),
        provenance=_provenance(videos, sides),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = sides[0].run / "report.html"
    write_file_atomically(path, page.encode())
    return path


def _facts(settings: Settings, videos: VideoSet, run: Path) -> dict[str, str]:
    """The run in a few words."""
    labels, held = videos.labels, videos.feature_cache.fingerprint
    checkpoint = load_checkpoint(run / CHECKPOINT)
    objects = f", {len(labels.tracks)} objects" if labels.has_tracks else ", labels not public"
    skipped = f" ({len(videos.skipped_ids)} more could not be read)" if videos.skipped_ids else ""
    return {
        "evaluated on": f"{videos.split}: {len(labels.videos)} videos{skipped}{objects}, "
        f"{len(labels.categories)} categories",
        "head": f"{num_parameters(checkpoint) / 1e6:.2f} M parameters, {checkpoint.step} steps "
        f"in {checkpoint.seconds:.0f} s, seed {settings.seed}{_of_another_step(settings, run, checkpoint)}",
        "detector": f"{'fine-tuned' if checkpoint.detector else 'frozen'}: {detector_in_words(held)}",
        "features": f"{shown(videos.feature_cache.path)}, codec {videos.feature_cache.root.codec_name}",
    }


def _of_another_step(settings: Settings, run: Path, checkpoint: Checkpoint) -> str:
    """Which step the predictions are of, where that is not the one the head has been trained to."""
    evaluated = load_metrics(run, HEAD).get("step", checkpoint.step)
    if evaluated == checkpoint.step:
        return ""
    late = settings.evaluate.checkpoint is CheckpointChoice.last
    return f"; what is shown is of step {evaluated}{', `make evaluate` renews it' if late else ', the best'}"


def _figures(
    labels: Labels,
    sides: Sequence[Side],
    scored: dict[str, Scored],
    matrices: dict[str, SimilarityMatrix],
    calibration: Calibration | None,
) -> tuple[dict[str, str | None], dict[str, numbers.Numbers]]:
    """Every figure, None where there is nothing to draw, and the tables of those that are drawn."""
    drawn: dict[str, str | None] = dict.fromkeys(("learning", "categories", "precision", "similarity", "codecs"))
    tables: dict[str, numbers.Numbers] = {}
    logs = {side.title: log for side in sides if side.method == HEAD and (log := read_metrics_log(side.run))}
    if logs:
        colours = {side.title: f"C{index % len(COLOURS)}" for index, side in enumerate(sides)}
        drawn["learning"], tables["learning"] = figures.learning_curves(logs, colours), numbers.learning(logs)
    if scored:
        names = [category.name for category in labels.categories]
        aps = {title: of.categories_K for title, of in scored.items()}
        curves = {side.title: precision_curves(side.evaluation.matches) for side in sides if side.evaluation}
        drawn["categories"], tables["categories"] = figures.category_bars(names, aps), numbers.categories(names, aps)
        drawn["precision"], tables["precision"] = figures.precision_recall(curves), numbers.precision(curves)
    if matrices:
        drawn["similarity"] = figures.similarity_heat_maps(matrices)
    if calibration is not None:
        drawn["codecs"], tables["codecs"] = figures.rate_distortion(calibration), numbers.codecs(calibration)
    return drawn, tables


def _similarity(videos: VideoSet, sides: Sequence[Side]) -> dict[str, SimilarityMatrix]:
    """Of every head, on the same video."""
    video = video_of_many_objects(videos.labels)
    found = {}
    for side in sides:
        if video is not None and side.method == HEAD:
            own = videos if side is sides[0] else open_evaluation_set(side.settings)
            matrix = similarity_matrix(side.settings, own, video)
            if matrix is not None:
                found[side.title] = matrix
    return found


def _scrubbed(settings: Settings, videos: VideoSet, sides: Sequence[Side]) -> list[ScrubbedVideo]:
    """`evaluate.report_videos` videos, spread over the split."""
    frames = evaluation_split(settings)[1].frames
    listed = videos.labels.videos
    chosen = [listed[index] for index in evenly(len(listed), settings.evaluate.report_videos)]
    return within_budget([scrub_video(video, frames, _drawn(videos.labels, sides, video)) for video in chosen])


def _drawn(labels: Labels, sides: Sequence[Side], video: Video) -> dict[str, list[DrawnTrack]]:
    truth = {TRUTH: labelled_tracks(labels, video.id)} if labels.has_tracks else {}
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
            found[f"training of {side.title}"] = json.loads(path.read_text())
    return found | {"this page": asdict(Provenance.gather())}
