"""The folder of a run, `<runs>/<name>/`: its resolved settings, where it came from, and its metrics over time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cache.errors import ConfigError, some
from cache.fingerprint import Provenance
from cache.labels.splits import Split
from cache.layout import write_file_atomically
from cache.storage.locks import held_alone
from configs.cards import write_run_card
from configs.changes import WITHOUT_EFFECT, default_settings, flat, in_yaml, is_among
from configs.schema import Settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG, PROVENANCE, SPLIT, METRICS_LOG = "config.yaml", "provenance.json", "split.json", "metrics.jsonl"
BOARD = "tensorboard"  # folder: `tensorboard --logdir runs` shows all runs

_FREE = ("evaluate", "detector.weights", *WITHOUT_EFFECT)
"""Settings that may differ when a run goes on: they change no weight. The fingerprint knows a detector's content."""


@contextmanager
def sole_trainer(folder: Path) -> Iterator[None]:
    """Keep other trainers out of a run's folder, and remove what killed ones were writing. Raises FolderBusy."""
    folder.mkdir(parents=True, exist_ok=True)
    with held_alone(folder, hint="let it finish or stop it; or choose another name=..."):
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink()
        yield


def open_run(settings: Settings, split: Split) -> Path:
    """Create the run's folder, or check that the training that was begun there belongs to the same settings and videos.

    A head that was imported and never trained here goes on with any. Raises ConfigError naming each setting in which a
    run of this name differs, or the videos.
    """
    folder = Path(settings.runs) / settings.name
    if (folder / CONFIG).exists() and (folder / METRICS_LOG).exists():
        differences = _differences(OmegaConf.load(folder / CONFIG), settings)
        if differences:
            raise ConfigError(
                f"a run of this name has other settings: {'; '.join(differences)}",
                where=folder,
                hint="choose another name=..., or delete the folder to train anew",
            )
        _require_same_videos(folder, split)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        provenance = Provenance.gather({"cache": settings.cache.path, "data": settings.data.root})
        write_file_atomically(folder / PROVENANCE, json.dumps(asdict(provenance), indent=2).encode())
        write_config(folder, settings)  # last: nothing is written twice
    write_run_card(folder, settings)
    write_file_atomically(folder / SPLIT, json.dumps(split.to_json(), indent=1).encode())
    return folder


def write_config(folder: Path, settings: Settings) -> None:
    """Write all settings of a run."""
    write_file_atomically(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(settings)).encode())


def _differences(stored: Any, wanted: Settings) -> list[str]:
    before = {**flat(default_settings()), **flat(stored)}  # with settings that are younger than the run
    now = flat(wanted)
    return [
        f"{key} was {in_yaml(before.get(key))}, now {in_yaml(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not is_among(key, _FREE)
    ]


def read_train_ids(folder: Path) -> tuple[int, ...] | None:
    """The ids of the videos that a run trains on; None where that is not written down (an imported head)."""
    path = folder / SPLIT
    return tuple(json.loads(path.read_text())["train_ids"]) if path.exists() else None


def _require_same_videos(folder: Path, split: Split) -> None:
    """Other videos are other clips: such as those that extraction left out, and could read since."""
    began = read_train_ids(folder)
    if began is not None and began != split.train_ids:
        changes = {"new": set(split.train_ids).difference(began), "gone": set(began).difference(split.train_ids)}
        told = [f"{word} {some(sorted(ids))}" for word, ids in changes.items() if ids] or ["another order"]
        raise ConfigError(
            f"a run of this name trains on other videos: {'; '.join(told)}",
            where=folder / SPLIT,
            hint="choose another name=..., or delete this file to go on with other videos",
        )


class MetricsLog:
    """Logged steps: one JSON line each in metrics.jsonl, and curves for TensorBoard where that is installed.

    A resumed run first drops what was logged after its checkpoint, and the AP of later steps than `evaluated`.
    """

    def __init__(self, folder: Path, resume_step: int, evaluated: int | None = None) -> None:
        self.path = folder / METRICS_LOG
        last_AP = resume_step if evaluated is None else evaluated
        kept = [e for e in read_metrics_log(folder) if e["step"] <= (last_AP if "AP" in e else resume_step)]
        write_file_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._board = _board(folder / BOARD, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of one step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _board(folder: Path, resume_step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=resume_step + 1)


def read_metrics_log(folder: Path) -> list[dict[str, float]]:
    """Return the logged steps of a run, in order; a killed run may leave half a line, which is none."""
    path = folder / METRICS_LOG
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
