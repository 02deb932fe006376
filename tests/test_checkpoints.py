"""A trained head and what it belongs to: its features, its categories, the file that it is exported to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cache.errors import ConfigError, FingerprintMismatch, WeightsError
from configs.schema import Settings
from evaluate.stage import score_head
from tests.conftest import tiny_settings
from tests.train_until import interrupt
from train_head.checkpoint import BEST, CHECKPOINT, load_checkpoint, save_checkpoint
from train_head.data.video_sets import open_training_set
from train_head.heads.vita import strip_release_prefix
from train_head.release import export_file
from train_head.run_folder import METRICS_LOG, MetricsLog, open_run
from train_head.trainer import train


def test_a_head_is_refused_where_its_numbers_mean_other_categories(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    """As a head of YouTube-VIS 2019 on labels of 2021: as many categories, in another order."""
    features = tmp_path / "features"
    shutil.copytree(tiny_cache, features)
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / tiny_run.name)
    for split in ("train", "valid"):
        path = features / split / "annotations.json"
        labels = json.loads(path.read_text())
        first, second = labels["categories"][1:3]
        first["name"], second["name"] = second["name"], first["name"]
        path.write_text(json.dumps(labels))
    settings = tiny_settings(tiny_data, features, tmp_path, "name=tiny")
    for use in (score_head, train):
        with pytest.raises(FingerprintMismatch, match=r"other categories(.|\n)*number 2 \(expected 'square', of 8"):
            use(settings)
    checkpoint = load_checkpoint(tmp_path / tiny_run.name / CHECKPOINT)
    with pytest.raises(FingerprintMismatch, match=r"number 9 .*'none', of 8, got 'owl', of 9"):
        checkpoint.require_categories([*checkpoint.category_names, "owl"], tmp_path)


def trained_copy(tiny_run: Settings, folder: Path) -> Path:
    """The checkpoint of a copy of the trained run."""
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, folder / tiny_run.name)
    return folder / tiny_run.name / CHECKPOINT


def test_the_exported_head_is_the_one_that_is_evaluated(tiny_run: Settings, tmp_path: Path) -> None:
    path = trained_copy(tiny_run, tmp_path)
    checkpoint = load_checkpoint(path)
    average = {name: tensor + 1 for name, tensor in checkpoint.head.items()}
    save_checkpoint(path, replace(checkpoint, average=average))
    assert "averaged" in export_file(path.parent, tmp_path / "vita.pth", None)
    exported = strip_release_prefix(torch.load(tmp_path / "vita.pth", weights_only=True)["model"])
    evaluated = load_checkpoint(path).build_head("cpu").state_dict()
    assert exported.keys() == evaluated.keys()
    assert all(torch.equal(exported[name], evaluated[name]) for name in evaluated)
    save_checkpoint(path, replace(checkpoint, head={}))
    with pytest.raises(WeightsError, match="no head"):
        export_file(path.parent, tmp_path / "empty.pth", None)
    assert not (tmp_path / "empty.pth").exists()


def test_refusals_name_settings_that_exist(tiny_run: Settings, tmp_path: Path) -> None:
    path = Path(tiny_run.runs) / tiny_run.name / CHECKPOINT
    checkpoint = load_checkpoint(path)
    others = {
        "use_sim": "loss.sim_weight is above 0",
        "map_dim": r"map_dim is \d+ \(of another",
        "window": "head.window",
    }
    for name, words in others.items():
        with pytest.raises(ConfigError, match=words):
            checkpoint.require_config(replace(checkpoint.config, **{name: 0}), path)
    with pytest.raises(WeightsError, match=r"train\.evaluate_every=N"):
        load_checkpoint(tmp_path / BEST)


def test_lack_of_memory_is_not_taken_for_a_damaged_file(tiny_run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(WeightsError, match="cannot be read: MemoryError") as refused:
        load_checkpoint(Path(tiny_run.runs) / tiny_run.name / CHECKPOINT)
    assert "delete" not in str(refused.value)


def test_what_changes_no_weight_may_change_when_a_run_goes_on(tiny_run: Settings, tmp_path: Path) -> None:
    path = trained_copy(tiny_run, tmp_path)
    settings, split = replace(tiny_run, runs=str(tmp_path)), open_training_set(tiny_run).holdout
    moved = replace(settings.detector, weights="elsewhere/detector", batch_frames=1)
    staged = replace(settings.cache, stage_to="/local", ignore_space=True)
    assert open_run(replace(settings, detector=moved, cache=staged), split) == path.parent
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        open_run(replace(settings, seed=1), split)


def test_a_run_that_is_killed_while_it_is_resumed_keeps_its_history(
    tiny_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained_copy(tiny_run, tmp_path)
    checkpoint = load_checkpoint(path)
    files = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    monkeypatch.setattr(Path, "replace", lambda *_: interrupt())  # what was written before is on disk, nothing after
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path.parent, 3)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, checkpoint)
    assert {file: file.read_bytes() for file in files} == files and path.parent / METRICS_LOG in files
