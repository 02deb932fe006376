"""Predictions kept with a run, by method: written by `evaluate run` and the ablations, read by `evaluate compare`.

A run's head keeps its own in `<run>/`; every other method that works from the same cache (the training-free
baseline, clip-wise association ...) keeps them in `<run>/<method>/`. Each place holds results.json, its zip and
metrics.json, which says of which split they are and, where its labels are public, how good. Those of the split that
was evaluated before lie beside them, as metrics.<split>.json and so on; nothing reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from cache.errors import CacheError, ConfigError
from cache.labels.tracks import Labels
from cache.layout import write_file_atomically
from configs.changes import WITHOUT_EFFECT, flat, is_among
from configs.schema import Settings
from evaluate.metrics.video_ap import VideoMetrics, evaluate_tracks
from evaluate.metrics.weighted import HEADLINE
from evaluate.results import RESULTS_NAME, RESULTS_ZIP, TrackPrediction, load_results, write_results
from train_head.data.video_sets import VideoSet

HEAD, BASELINE = "head", "baseline"
METRICS_NAME = "metrics.json"
_EVALUATED_WITH = "settings"
"""In metrics.json: those of the evaluation, which may be others than the run was trained with."""
_LEFT_OUT = "left_out"
"""In metrics.json of a method without predictions: why it has none."""
_METHOD = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def method_folder(run: Path, method: str) -> Path:
    """Where a run keeps a method's predictions. Raises ConfigError for a name that is no plain folder name."""
    if not _METHOD.fullmatch(method):
        raise ConfigError("not a name of a method", expected="lower-case letters, digits, _ . -", got=repr(method))
    return run if method == HEAD else run / method


def store_predictions(
    settings: Settings,
    videos: VideoSet,
    method: str,
    predictions: Sequence[TrackPrediction],
    *,
    seconds: float,
    step: int | None,
) -> VideoMetrics | None:
    """Write a method's predictions for the videos of a set, score them where the labels are public.

    `method` names the row in tables and the folder (see `method_folder`); `seconds` is what inference took;
    `step` is that of the run's head, None where none took part: its parameters and training time are then not counted.
    `python -m evaluate compare <run> --with <method>` then compares them. Returns None without public labels.
    """
    folder = method_folder(Path(settings.runs) / settings.name, method)
    _set_aside(folder, videos.split)
    write_results(folder / RESULTS_NAME, predictions)
    metrics = evaluate_tracks(videos.labels, predictions) if videos.labels.has_tracks else None
    evaluated_with = {
        key: value
        for key, value in flat(settings).items()
        if is_among(key, ["evaluate"]) and not is_among(key, ["evaluate.split", *WITHOUT_EFFECT])
    }
    _write_metrics(
        folder,
        videos,
        metrics,
        {"trained": step is not None, "step": step, "seconds": seconds, _EVALUATED_WITH: evaluated_with},
    )
    return metrics


def leave_out(settings: Settings, videos: VideoSet, method: str, reason: str) -> None:
    """Note why a method can predict nothing for a set; what it predicted before is removed."""
    folder = method_folder(Path(settings.runs) / settings.name, method)
    folder.mkdir(parents=True, exist_ok=True)
    _set_aside(folder, videos.split)
    for name in (RESULTS_NAME, RESULTS_ZIP):
        (folder / name).unlink(missing_ok=True)
    _write_metrics(folder, videos, None, {_LEFT_OUT: reason})


def _set_aside(folder: Path, split: str) -> None:
    """Rename what a folder holds of another split, before that of `split` takes its place."""
    metrics = folder / METRICS_NAME
    former = json.loads(metrics.read_text()).get("split", split) if metrics.exists() else split
    for name in (RESULTS_NAME, RESULTS_ZIP, METRICS_NAME):  # metrics, which tell the split, last
        path = folder / name
        if former != split and path.exists():
            path.replace(_beside(path, former))
        _beside(path, split).unlink(missing_ok=True)
    if former != split:
        print(f"split {split} follows split {former}, whose metrics are now in {_beside(metrics, former)}")


def _beside(path: Path, split: str) -> Path:
    return path.with_stem(f"{path.stem}.{split}")


def _write_metrics(folder: Path, videos: VideoSet, metrics: VideoMetrics | None, more: dict[str, Any]) -> None:
    content = {
        **(dict.fromkeys(HEADLINE) if metrics is None else metrics.to_json()),
        "split": videos.split,
        "num_videos": len(videos.video_ids),
        "skipped_ids": list(videos.skipped_ids),
        "labels_sha256": labels_digest(videos.labels),
        **more,
        "fingerprint": asdict(videos.feature_cache.fingerprint),
    }
    write_file_atomically(folder / METRICS_NAME, json.dumps(content, indent=1).encode())


def stored_methods(run: Path, split: str | None = None) -> list[str]:
    """Names of the methods whose predictions a run keeps (where `split` is given, of that split), the head first."""
    others = sorted(path.parent.name for path in run.glob(f"*/{RESULTS_NAME}"))
    methods = [HEAD, *others] if (run / RESULTS_NAME).exists() else others
    return [m for m in methods if split is None or load_metrics(run, m).get("split", split) == split]


def shown_methods(run: Path, split: str, asked: Sequence[str] | None = None) -> list[str]:
    """The head and the methods `asked` for; by default the baseline where the run keeps it of the split.

    Ablations leave a dozen methods, which would crowd out what a page is about. Raises CacheError where a method's
    predictions are of another split.
    """
    for method in asked or ():
        if (own := load_metrics(run, method).get("split", split)) != split:
            hint = (
                "evaluate both on one split: `make evaluate`, or `python -m evaluate ablate`, with evaluate.split=..."
            )
            raise CacheError(
                f"predictions of {method} are of another split", where=run, expected=split, got=own, hint=hint
            )
    beside = [method for method in stored_methods(run, split) if method == BASELINE] if asked is None else asked
    return list(dict.fromkeys([HEAD, *beside]))


def methods_left_out(run: Path, split: str | None = None) -> dict[str, str]:
    """Methods that could predict nothing (where `split` is given, for that split), and why."""
    stored = {path.parent.name: json.loads(path.read_text()) for path in run.glob(f"*/{METRICS_NAME}")}
    found = {method: of for method, of in stored.items() if _LEFT_OUT in of and split in (None, of["split"])}
    return {method: of[_LEFT_OUT] for method, of in found.items()}


def require_predictions(run: Path, method: str) -> Path:
    """Return a method's result file. Raises CacheError where the run keeps none."""
    path = method_folder(run, method) / RESULTS_NAME
    if not path.exists():
        raise CacheError(
            f"no predictions of {method}",
            where=run,
            got=methods_left_out(run).get(method, f"methods: {', '.join(stored_methods(run)) or 'none'}"),
            hint="`make evaluate` writes those of head and baseline; `python -m evaluate ablate` others",
        )
    return path


def load_predictions(run: Path, method: str, labels: Labels) -> list[TrackPrediction]:
    """Read a method's predictions. Raises CacheError where there are none, AnnotationError for other labels."""
    return load_results(require_predictions(run, method), labels)


def load_metrics(run: Path, method: str) -> dict[str, Any]:
    """Return metrics.json of a method; empty where there is none."""
    path = method_folder(run, method) / METRICS_NAME
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def as_evaluated(settings: Settings, run: Path, method: str) -> Settings:
    """The settings, but for those that a method of a run was evaluated with."""
    merged = OmegaConf.structured(settings)
    for key, value in load_metrics(run, method).get(_EVALUATED_WITH, {}).items():
        OmegaConf.update(merged, key, value)
    return cast(Settings, OmegaConf.to_object(merged))


def labels_digest(labels: Labels) -> str:
    """SHA-256 (hex) of the labels themselves, however their file was laid out."""
    canonical = json.dumps(labels.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
