"""The paper's inference tables from one cache and one head, without training anything again (VITA, Tables 3, 5, 6)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cache.errors import ConfigError
from cache.layout import video_group_name, write_file_atomically
from cache.progress import with_progress
from configs.schema import Settings
from evaluate.metrics.video_ap import VideoMetrics, evaluate_tracks
from evaluate.metrics.weighted import HEADLINE
from evaluate.results import TrackPrediction
from evaluate.score import percent
from evaluate.stored import store_predictions
from evaluate.tracks.association import Matching, link, predict_clips
from evaluate.tracks.predictors import HeadPredictor, head_predictor
from evaluate.tracks.whole_video import predict_videos, submitted
from train_head.data.video_sets import VideoSet, open_evaluation_set
from train_head.heads.vita import VitaHead

WINDOWS = (3, 6, 12, 0)  # frames; 0 is all
KEPT = (1.0, 0.75, 0.5, 0.25, 0.1)  # share of the frame queries
CLIP_LENGTHS = (1, 5, 10, 20, 36)  # frames
TOP_K = (1, 5, 10, 20, 50)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of inference: what was changed, what came out."""

    variant: str
    metrics: dict[str, float | None]  # fractions
    frames_per_second: float


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The head of a run and the labelled videos that it is tried on."""

    settings: Settings
    videos: VideoSet
    predictor: HeadPredictor

    def row(self, variant: str, metrics: VideoMetrics, seconds: float) -> Row:
        frames = sum(video.length for video in self.videos.labels.videos)
        values = {name: value for name, value in asdict(metrics).items() if name in HEADLINE}
        return Row(variant=variant, metrics=values, frames_per_second=frames / seconds)

    def whole_videos(self, variant: str, predictor: HeadPredictor) -> Row:
        """Whole-video inference by a changed predictor."""
        started = time.perf_counter()
        predictions = predict_videos(self.videos, predictor, variant)
        seconds = time.perf_counter() - started
        return self.row(variant, evaluate_tracks(self.videos.labels, predictions), seconds)


def ablate(what: str, settings: Settings) -> str:
    """Measure every variant; return the table, also written to `<run>/ablate_<what>.json` and `.md`.

    `what`: a key of ABLATIONS. Raises ConfigError for a split without labels, WeightsError for a run without a head.
    """
    videos = open_evaluation_set(settings)
    if not videos.labels.has_tracks:
        raise ConfigError("an ablation needs labels", where=f"split {videos.split}", hint="set evaluate.split=holdout")
    found = _Run(settings=settings, videos=videos, predictor=head_predictor(settings, videos))
    rows = list(ABLATIONS[what](found))
    path = Path(settings.runs) / settings.name / f"ablate_{what}.json"
    content = {"split": videos.split, "rows": [asdict(row) for row in rows]}
    write_file_atomically(path, json.dumps(content, indent=1).encode())
    table = markdown(what, rows)
    write_file_atomically(path.with_suffix(".md"), f"{table}\n".encode())
    return f"{table}\nwritten: {path}, {path.with_suffix('.md').name}"


def markdown(what: str, rows: list[Row]) -> str:
    """One row per variant: metrics x 100, frames a second."""
    lines = [f"| {what} | {' | '.join(HEADLINE)} | frames/s |", "|" + "---|" * (len(HEADLINE) + 2)]
    for row in rows:
        numbers = " | ".join(percent(row.metrics[name]) for name in HEADLINE)
        lines.append(f"| {row.variant} | {numbers} | {row.frames_per_second:.0f} |")
    return "\n".join(lines)


def _windows(found: _Run) -> Iterator[Row]:
    head = found.predictor.head
    if not isinstance(head, VitaHead):
        raise ConfigError("only VITA's head has windows", where="ablate windows", got=f"head.kind={head.config.kind}")
    trained = head.config
    for window in WINDOWS:
        head.config = replace(trained, window=window)  # shapes no weight
        yield found.whole_videos(f"W = {window or 'all'}", found.predictor)
    head.config = trained


def _pruning(found: _Run) -> Iterator[Row]:
    for share in KEPT:
        choices = replace(found.predictor.choices, keep_queries=share)
        yield found.whole_videos(f"kept {share:.2f}", replace(found.predictor, choices=choices))


def _topk(found: _Run) -> Iterator[Row]:
    for top_k in TOP_K:
        choices = replace(found.predictor.choices, top_k=top_k)
        yield found.whole_videos(f"top {top_k}", replace(found.predictor, choices=choices))


def _association(found: _Run) -> Iterator[Row]:
    """Clips of several lengths, linked in both ways, against whole videos; kept with the run for `compare`."""
    for length in CLIP_LENGTHS:
        predictions: dict[Matching, list[TrackPrediction]] = {matching: [] for matching in Matching}
        started = time.perf_counter()
        for video in with_progress(found.videos.labels.videos, f"clips of {length}", unit="video"):
            cached = found.videos.feature_cache.video(video_group_name(video.id))
            clips = list(predict_clips(found.predictor, cached, length))
            for matching, tracks in predictions.items():
                linked = link(clips, (video.height, video.width), matching, found.predictor.choices.top_k)
                tracks.extend(submitted(found.videos.labels, video, linked))
        seconds = time.perf_counter() - started  # the head once, both links
        for matching, tracks in predictions.items():
            method = f"clips{length}-{matching.value}"
            metrics = store_predictions(
                found.settings, found.videos, method, tracks, seconds=seconds, step=found.predictor.step
            )
            assert metrics is not None  # `ablate` asks for labels
            yield found.row(f"clips of {length}, {matching.value}", metrics, seconds)
    yield found.whole_videos("whole videos", found.predictor)


ABLATIONS: dict[str, Callable[[_Run], Iterator[Row]]] = {
    "windows": _windows,
    "pruning": _pruning,
    "association": _association,
    "topk": _topk,
}
