"""Evaluate a run: tracks of the head and of the baseline from the same cache, scored if the labels are public."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import CheckpointChoice, Settings
from evaluate.metrics.video_ap import VideoMetrics, evaluate_tracks
from evaluate.stored import BASELINE, HEAD, leave_out, methods_left_out, store_predictions
from evaluate.tracks.predictors import VideoPredictor, baseline_predictor, head_predictor, known_categories
from evaluate.tracks.whole_video import predict_videos
from train_head.data.video_sets import open_evaluation_set


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics by method (None for a split without public labels) and where they were written."""

    folder: Path
    split: str
    metrics: dict[str, VideoMetrics | None]
    left_out: dict[str, str]  # methods that can predict nothing here, and why
    num_videos: int
    num_skipped: int  # further videos of the split, which extraction could not read


def evaluate(settings: Settings) -> Evaluation:
    """Predict with the run's head and with the baseline, write results.json, its zip and metrics.json for both.

    Raises WeightsError where the run has no checkpoint, FingerprintMismatch where head and cache differ.
    """
    run = Path(settings.runs) / settings.name
    videos = open_evaluation_set(settings)
    metrics: dict[str, VideoMetrics | None] = {}
    head = head_predictor(settings, videos)
    predictors: dict[str, VideoPredictor] = {HEAD: head}
    if known_categories(videos):
        predictors[BASELINE] = baseline_predictor(settings, videos)
    else:  # scores of zero alone, whose order would decide its AP
        leave_out(settings, videos, BASELINE, "the detector knows none of the data set's categories")
    for method, predictor in predictors.items():
        started = time.perf_counter()
        predictions = predict_videos(videos, predictor, f"evaluate {method}")
        seconds = time.perf_counter() - started
        metrics[method] = store_predictions(
            settings, videos, method, predictions, seconds=seconds, step=head.step if method == HEAD else None
        )
    return Evaluation(
        folder=run,
        split=videos.split,
        metrics=metrics,
        left_out=methods_left_out(run, videos.split),
        num_videos=len(videos.video_ids),
        num_skipped=len(videos.skipped_ids),
    )


def score_head(settings: Settings) -> float | None:
    """AP of the run's newest checkpoint, without writing anything; None where the split has no labels."""
    videos = open_evaluation_set(settings)
    if not videos.labels.has_tracks:
        return None
    newest = replace(settings, evaluate=replace(settings.evaluate, checkpoint=CheckpointChoice.last))
    return evaluate_tracks(videos.labels, predict_videos(videos, head_predictor(newest, videos), "evaluate")).AP
