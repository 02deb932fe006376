"""Tables on the console: metrics by method, seconds and bytes by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.storage.stores import open_store
from cache.upkeep.inspection import ExtractionRecord
from configs.schema import Settings
from configs.splits import all_caches
from evaluate.metrics.weighted import HEADLINE
from evaluate.results import RESULTS_NAME, RESULTS_ZIP
from evaluate.score import percent
from evaluate.stage import Evaluation
from evaluate.stored import HEAD, load_metrics, method_folder, methods_left_out, stored_methods
from train_head.checkpoint import CHECKPOINT
from train_head.run_folder import read_metrics_log


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage took and left on disk."""

    stage: str
    seconds: float
    bytes: int


def evaluation_table(evaluation: Evaluation) -> str:
    """Metrics x 100 by method, or a sentence where the split has no public labels."""
    rows = {method: m.to_json() for method, m in evaluation.metrics.items() if m is not None}
    results = evaluation.folder / RESULTS_ZIP
    if not rows:
        return f"split {evaluation.split} has no labels: predictions to submit are in {results}{_skipped(evaluation)}"
    table = metrics_table(rows, evaluation.left_out)
    return f"{table}\nsplit {evaluation.split}; predictions in {results}{_skipped(evaluation)}"


def _skipped(evaluation: Evaluation) -> str:
    skipped, kept = evaluation.num_skipped, evaluation.num_videos
    what = f"without {skipped} of {skipped + kept} videos, which extraction could not read"
    return f"\n{what}: not comparable with results on all of them" if skipped else ""


def metrics_table(rows: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str]) -> str:
    """One row per method, one decimal, `–` where undefined; methods that were left out, and why."""
    every = {**rows, **{method: dict.fromkeys(HEADLINE) for method in left_out}}
    width = max(len(name) for name in every) + 2
    lines = [" " * width + "".join(f"{name:>7}" for name in HEADLINE)]
    lines += [
        f"{method:<{width}}" + "".join(percent(row[name]).rjust(7) for name in HEADLINE)
        for method, row in every.items()
    ]
    return "\n".join([*lines, *(f"no {method}: {reason}" for method, reason in left_out.items())])


def read_metrics(run: Path) -> dict[str, dict[str, Any]]:
    """Return metrics.json of a run's head and of what else was evaluated on the same split; empty where nothing was."""
    split = load_metrics(run, HEAD).get("split")
    found = {method: load_metrics(run, method) for method in stored_methods(run, split)}
    return {method: metrics for method, metrics in found.items() if metrics}


def extraction_costs(settings: Settings) -> list[StageCost]:
    """What the extraction of every split took, as far as it is recorded."""
    records = {split.name: ExtractionRecord.read(open_store(split.features)) for split in all_caches(settings)}
    return [StageCost(stage=f"extract {n}", seconds=r.seconds, bytes=r.bytes) for n, r in records.items() if r.bytes]


def stage_costs(settings: Settings) -> list[StageCost]:
    """Seconds and bytes of every stage of a run that has happened."""
    run = Path(settings.runs) / settings.name
    costs = extraction_costs(settings)
    log = [entry for entry in read_metrics_log(run) if "seconds" in entry]
    if log and (run / CHECKPOINT).exists():
        size = (run / CHECKPOINT).stat().st_size
        costs.append(StageCost(stage="train", seconds=log[-1]["seconds"], bytes=size))
    for method, metrics in read_metrics(run).items():
        results = method_folder(run, method) / RESULTS_NAME
        costs.append(StageCost(stage=f"evaluate {method}", seconds=metrics["seconds"], bytes=results.stat().st_size))
    return costs


def run_summary(settings: Settings) -> str:
    """The table that ends `make demo`: metrics by method, then seconds and bytes by stage."""
    run = Path(settings.runs) / settings.name
    metrics = read_metrics(run)
    parts = [metrics_table(metrics, methods_left_out(run, load_metrics(run, HEAD).get("split")))] if metrics else []
    costs = [f"{'stage':<20}{'seconds':>9}{'MB':>10}"]
    costs += [f"{c.stage:<20}{c.seconds:>9.1f}{c.bytes / 1e6:>10.1f}" for c in stage_costs(settings)]
    return "\n\n".join([*parts, "\n".join(costs)])
