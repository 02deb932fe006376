"""Whose tracks a report shows: head and baseline of the run, other methods, the heads of other runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, ConfigError
from cache.labels.tracks import Labels
from configs.schema import Settings
from evaluate.compare.runs import LabelFiles, read_entries
from evaluate.metrics.bootstrap import Interval, split_and_draws
from evaluate.metrics.video_ap import VideoEvaluation
from evaluate.metrics.weighted import HEADLINE, FloatArray
from evaluate.pictures.overlays import TRUTH
from evaluate.results import TrackPrediction
from evaluate.stored import HEAD, load_predictions, shown_methods, stored_methods
from train_head.data.video_sets import VideoSet


@dataclass(frozen=True, kw_only=True)
class Side:
    """One method's tracks; `evaluation` is None where the split has no public labels."""

    title: str
    method: str
    settings: Settings
    predictions: Sequence[TrackPrediction]
    evaluation: VideoEvaluation | None

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.settings.runs) / self.settings.name


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A side's numbers: the headline with 95 % intervals over videos, and AP by category."""

    headline: dict[str, Interval]
    categories_K: FloatArray


def read_sides(
    settings: Settings, videos: VideoSet, beside: Sequence[Path], methods: Sequence[str] | None = None
) -> list[Side]:
    """The run's head, its other `methods` (None: the baseline), then the heads of the runs beside it; no title twice.

    Raises CacheError where the run is not evaluated on these videos yet, ConfigError where a run beside it has others,
    or is given twice.
    """
    run, labels = Path(settings.runs) / settings.name, videos.labels
    if HEAD not in stored_methods(run, videos.split):
        hint = "`make evaluate` with the same config comes first"
        raise CacheError(f"nothing to report yet on split {videos.split}", where=run, hint=hint)
    shown = shown_methods(run, videos.split, methods)
    sides = [_side(method, method, settings, load_predictions(run, method, labels), labels) for method in shown]
    files = LabelFiles()
    for path in beside:
        if any(path.resolve() == side.run.resolve() for side in sides):
            raise ConfigError("a run is shown already", where=path)
        entry = read_entries(path, [HEAD], files)[0]
        if entry.labels.videos != labels.videos or entry.labels.categories != labels.categories:
            raise ConfigError(
                "a run beside another must be evaluated on the same videos and categories",
                where=path,
                expected=f"{len(labels.videos)} videos as in {run}",
                got=f"split {entry.split}, {len(entry.labels.videos)} videos",
            )
        title = _free_title(path, [TRUTH, *(side.title for side in sides)])
        sides.append(_side(title, HEAD, entry.settings, entry.predictions, labels))
    return sides


def _free_title(run: Path, taken: Sequence[str]) -> str:
    """The folder's name, with as many of the folders above it as make it another than those taken."""
    parts = run.resolve().parts
    return next(title for n in range(1, len(parts) + 1) if (title := "/".join(parts[-n:])) not in taken)


def _side(title: str, method: str, settings: Settings, predictions: Sequence[TrackPrediction], labels: Labels) -> Side:
    evaluation = VideoEvaluation(labels, predictions) if labels.has_tracks else None
    return Side(title=title, method=method, settings=settings, predictions=predictions, evaluation=evaluation)


def score_sides(sides: Sequence[Side]) -> dict[str, Scored]:
    """Score every side on the same resamples of the videos; empty without labels."""
    scored = {}
    for side in sides:
        if side.evaluation is not None:
            scores = side.evaluation.scores(split_and_draws(len(side.evaluation.labels.videos)))
            headline = scores.headline()
            scored[side.title] = Scored(
                headline={name: Interval.of(headline[name]) for name in HEADLINE},
                categories_K=scores.by_category()[0],
            )
    return scored
