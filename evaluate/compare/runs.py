"""What is compared: a run with one of its methods, read from its folder and scored anew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cache.errors import CacheError, ConfigError
from cache.fingerprint import Fingerprint
from cache.labels.annotations import load_labels
from cache.labels.tracks import Labels
from cache.reader import FeatureCache
from configs.load import load_settings
from configs.schema import Settings
from configs.splits import all_caches
from evaluate.metrics.video_ap import VideoEvaluation
from evaluate.results import TrackPrediction
from evaluate.stored import HEAD, load_metrics, load_predictions, require_predictions, stored_methods
from train_head.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint
from train_head.data.video_sets import chosen_videos, evaluation_split
from train_head.run_folder import CONFIG, PROVENANCE


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run cost, with the fine-tuning of its detector; None where no record is left."""

    trainable_parameters: int | None
    training_seconds: float | None
    extraction_seconds: float | None  # of all splits
    cache_bytes: int | None  # of all splits
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
        self._read: dict[Path, Labels] = {}

    def of(self, settings: Settings) -> tuple[str, Labels]:
        """Name and labels of the split that a run is evaluated on; from its cache, or else the data set."""
        split, paths = evaluation_split(settings)
        if paths.features not in self._read:
            try:
                labels = FeatureCache.open(paths.features).labels()
            except CacheError:
                labels = load_labels(paths.labels)
            self._read[paths.features] = labels
        return split, chosen_videos(settings, split, self._read[paths.features])[0]


def read_entries(run: Path, methods: Sequence[str] | None, label_files: LabelFiles) -> list[Entry]:
    """Read a run's head and other methods (None: all that it keeps).

    Raises ConfigError where the folder is no run, CacheError where it was not evaluated, AnnotationError where its
    split has no public labels.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError("no run here", where=run, expected=f"a folder with {CONFIG}", hint="name folders of runs/")
    settings = load_settings(str(run / CONFIG))
    split, labels = label_files.of(settings)
    names = stored_methods(run) if methods is None else [HEAD, *methods]
    return [_entry(run, method, settings, split, labels) for method in dict.fromkeys(names) or (HEAD,)]


def _entry(run: Path, method: str, settings: Settings, split: str, labels: Labels) -> Entry:
    require_predictions(run, method)
    scored = load_metrics(run, method)
    checkpoint = load_checkpoint(run / CHECKPOINT)
    trained = bool(scored.get("trained", method == HEAD))
    tuning = _tuning(run, settings, checkpoint)
    records = [split.features / "extraction.json" for split in all_caches(settings)]
    extraction = [json.loads(record.read_text()) for record in records if record.exists()]
    provenance = run / PROVENANCE
    return Entry(
        run=run,
        method=method,
        trained=trained,
        settings=settings,
        split=split,
        labels=labels,
        scored=scored,
        fingerprint=checkpoint.fingerprint,
        steps=checkpoint.step,
        costs=Costs(
            trainable_parameters=(_parameters(checkpoint) if trained else 0) + (_parameters(tuning) if tuning else 0),
            training_seconds=(checkpoint.seconds if trained else 0.0) + (tuning.seconds if tuning else 0.0),
            extraction_seconds=sum(record["seconds"] for record in extraction) if extraction else None,
            cache_bytes=sum(record["bytes"] for record in extraction) if extraction else None,
            inference_seconds=scored.get("seconds"),
        ),
        provenance=json.loads(provenance.read_text()) if provenance.exists() else {},
    )


def _tuning(run: Path, settings: Settings, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint of the other run that fine-tuned this one's detector; None where no run here did."""
    made = Path(settings.detector.weights).parent / CHECKPOINT
    if not made.is_file() or made.parent.resolve() == run.resolve():
        return None
    tuning = load_checkpoint(made)
    same = tuning.detector and tuning.fingerprint.weights_sha256 == checkpoint.fingerprint.weights_sha256
    return tuning if same else None


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(tensor.numel() for part in (checkpoint.head, checkpoint.detector) for tensor in part.values())
