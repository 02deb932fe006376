"""What is compared: a run with one of its methods, read from its folder and scored anew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cache.errors import CacheError, ConfigError
from cache.fingerprint import Fingerprint
from cache.labels.tracks import Labels
from cache.reader import FeatureCache
from configs.load import load_settings
from configs.schema import Settings, Split
from evaluate.metrics.video_ap import VideoEvaluation
from evaluate.results import TrackPrediction
from evaluate.stored import (
    HEAD,
    as_evaluated,
    load_metrics,
    load_predictions,
    require_predictions,
    shown_methods,
)
from evaluate.tables import extraction_costs
from train_head.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint
from train_head.data.video_sets import chosen_videos, evaluation_split, without_skipped
from train_head.run_folder import CONFIG, PROVENANCE


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run cost (of several, the means), with the fine-tuning of its detector; None where no record is left."""

    trainable_parameters: float
    training_seconds: float
    extraction_seconds: float | None  # of all splits
    cache_bytes: float | None  # of all splits
    inference_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run with one method; its predictions are read and matched when they are asked for."""

    run: Path
    method: str
    trained: bool  # by the run, or a method that needs no training
    settings: Settings
    split: str
    labels: Labels
    scored: dict[str, Any]  # metrics.json of when it was evaluated
    fingerprint: Fingerprint  # of the features
    steps: int  # of training that the checkpoint has
    costs: Costs
    provenance: dict[str, Any]  # provenance.json of the run

    @cached_property
    def predictions(self) -> Sequence[TrackPrediction]:
        """Its predictions for the videos of `labels`."""
        return load_predictions(self.run, self.method, self.labels)

    @cached_property
    def evaluation(self) -> VideoEvaluation:
        """Its predictions, matched."""
        return VideoEvaluation(self.labels, self.predictions)


class LabelFiles:
    """The labels of many runs, each file read once."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[Labels, dict[str, str]]] = {}

    def of(self, settings: Settings) -> tuple[str, Labels]:
        """Name and labels of the split that a run is evaluated on; from its cache, or else the data set."""
        split, paths = evaluation_split(settings)
        if paths.features not in self._read:
            try:
                feature_cache = FeatureCache.open(paths.features)
                self._read[paths.features] = (feature_cache.labels(), feature_cache.skipped())
            except CacheError:
                self._read[paths.features] = (paths.read_labels(), {})
        labels, skipped = self._read[paths.features]
        return split, without_skipped(chosen_videos(settings, split, labels)[0], skipped)[0]


def read_entries(run: Path, methods: Sequence[str] | None, label_files: LabelFiles) -> list[Entry]:
    """Read a run's head and other methods (None: the baseline), on the split that the head was evaluated on last.

    Raises ConfigError where the folder is no run, CacheError where it was not evaluated, AnnotationError where its
    split has no public labels.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError("no run here", where=run, expected=f"a folder with {CONFIG}", hint="name folders of runs/")
    settings = _settings(run, HEAD)
    split, labels = label_files.of(settings)
    names = shown_methods(run, split, methods)
    for method in names:
        require_predictions(run, method)
    checkpoint = load_checkpoint(run / CHECKPOINT)
    tuning, extraction = _tuning(run, settings, checkpoint), extraction_costs(settings)
    provenance = run / PROVENANCE
    entry = partial(
        Entry,
        run=run,
        split=split,
        labels=labels,
        fingerprint=checkpoint.fingerprint,
        steps=checkpoint.step,
        provenance=json.loads(provenance.read_text()) if provenance.exists() else {},
    )
    entries = []
    for method in names:
        scored = load_metrics(run, method)
        trained = bool(scored.get("trained", method == HEAD))
        trainings = [part for part in (tuning, checkpoint if trained else None) if part is not None]
        costs = Costs(
            trainable_parameters=sum(map(num_parameters, trainings)),
            training_seconds=sum(part.seconds for part in trainings),
            extraction_seconds=sum(cost.seconds for cost in extraction) if extraction else None,
            cache_bytes=sum(cost.bytes for cost in extraction) if extraction else None,
            inference_seconds=scored.get("seconds"),
        )
        own = _settings(run, method)
        entries.append(entry(method=method, settings=own, trained=trained, scored=scored, costs=costs))
    return entries


def _settings(run: Path, method: str) -> Settings:
    """A run's settings, but for those that a method was evaluated with, and for the folder, wherever it is by now."""
    settings, place = as_evaluated(load_settings(str(run / CONFIG)), run, method), run.resolve()
    split = Split(load_metrics(run, method).get("split", settings.evaluate.split))
    return replace(settings, runs=str(place.parent), name=place.name, evaluate=replace(settings.evaluate, split=split))


def _tuning(run: Path, settings: Settings, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint of the other run that fine-tuned this one's detector; None where no run here did."""
    made = Path(settings.detector.weights).parent / CHECKPOINT
    if not made.is_file() or made.parent.resolve() == run.resolve():
        return None
    tuning = load_checkpoint(made)
    same = tuning.detector and tuning.fingerprint.weights_sha256 == checkpoint.fingerprint.weights_sha256
    return tuning if same else None


def num_parameters(checkpoint: Checkpoint) -> int:
    """How many numbers a run trains, in its head and in its detector, whose batch norms stay frozen."""
    parts = (checkpoint.head, checkpoint.detector)
    return sum(
        tensor.numel()
        for part in parts
        for name, tensor in part.items()
        if f"{name.rpartition('.')[0]}.running_mean" not in part
    )


def detector_in_words(fingerprint: Fingerprint) -> str:
    """The detector behind features."""
    edge = f"short edge {fingerprint.short_edge}" if fingerprint.short_edge else "native size"
    weights = f"weights {fingerprint.weights_sha256[:12]}"
    return f"{fingerprint.architecture}, {weights}, {edge}, {fingerprint.precision}"
