from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cache.command import INTERRUPTED
from cache.errors import ConfigError
from tests.conftest import tiny_settings
from tests.test_clip_loader import wait_for
from tests.train_until import ROOT
from train_head.checkpoint import CHECKPOINT
from train_head.run_folder import METRICS_LOG
from train_head.sweep import LOG, lane_environments, plan, sweep, table


def tiny_config(data: Path, features: Path, folder: Path, *overrides: str) -> Path:
    config = folder / "config.yaml"
    OmegaConf.save(OmegaConf.structured(tiny_settings(data, features, folder / "runs", *overrides)), config)
    return config


def test_the_product_of_what_varies() -> None:
    runs = plan("demo", ["train.learning_rate=1e-4,5e-5", "device=cpu", "train.decay_steps=[3,4]", "seed=0,1"])
    assert [run.name for run in runs] == [
        f"demo-train.learning_rate={rate}-seed={seed}" for rate in ("1e-4", "5e-5") for seed in (0, 1)
    ]
    assert runs[2].overrides == ("device=cpu", "train.decay_steps=[3,4]", "train.learning_rate=5e-5", "seed=0")
    assert [run.variant for run in runs] == ["train.learning_rate=1e-4"] * 2 + ["train.learning_rate=5e-5"] * 2
    assert [run.name for run in plan("demo", ["device=cpu"])] == ["demo"]


def test_mean_and_sample_deviation_over_seeds() -> None:
    rows = [dict.fromkeys(("AP", "AP50", "AP75", "AR1", "AR10"), value) for value in (0.1, 0.2, 0.3, None)]
    lines = table(["a", "a", "a", "b"], rows).splitlines()
    assert lines[1].split()[:5] == ["a", "3", "20.0", "±", "10.0"]
    assert lines[2].split() == ["b", "1", *["-"] * 5]
    assert table(["", ""], rows[:2]).splitlines()[1].split()[:2] == ["all", "2"]
    assert len({len(line) for line in table([""], rows[:1]).splitlines()}) == 1


def test_every_combination_has_a_run_of_its_own() -> None:
    runs = plan("demo", ["train.decay_steps=[1,2],[12]", "detector.weights=a/b,ab"])
    assert [run.name for run in runs][:2] == [f"demo-train.decay_steps=1_2-detector.weights={w}" for w in ("a_b", "ab")]
    assert len({run.name for run in runs}) == 4
    with pytest.raises(ConfigError, match="seed=0"):
        plan("demo", ["seed=0,1,0"])


def test_jobs_share_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are those that one run would take, not the machine's: a cluster's job may have few of its cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(7)
    try:
        lanes = lane_environments(3, ["4", "7"])
    finally:
        torch.set_num_threads(1)
    assert [lane["CUDA_VISIBLE_DEVICES"] for lane in lanes] == ["4", "7", "4"]
    assert [lane["OMP_NUM_THREADS"] for lane in lanes] == ["2"] * 3
    assert lane_environments(3, [])[0]["OMP_NUM_THREADS"] == "1"
    assert lane_environments(2, []) == lane_environments(2, [])[:1] * 2


def test_a_sweep_without_labels_to_score_on_trains_nothing(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "features"
    shutil.copytree(tiny_cache, unlabelled)
    path = unlabelled / "valid" / "annotations.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": None}))
    config = tiny_config(tiny_data, unlabelled, tmp_path)
    with pytest.raises(ConfigError, match="needs public labels"):
        sweep(str(config), ["seed=0,1"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_sweep_without_jobs_is_refused(jobs: int) -> None:
    with pytest.raises(ConfigError, match=f"--jobs: .*got {jobs}"):
        sweep("demo", ["seed=0,1"], jobs)


def to_it_alone(process: subprocess.Popen[str]) -> None:
    process.terminate()


def to_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("send", [pytest.param(to_it_alone, marks=pytest.mark.slow), to_all])
def test_the_runs_of_a_stopped_sweep_end_with_it(
    send: Callable[[subprocess.Popen[str]], None], tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    words = ("name=tiny", "train.workers=0", "train.iterations=100000", "train.checkpoint_every=100000")
    config = tiny_config(tiny_data, tiny_cache, tmp_path, *words)
    command = [sys.executable, "-m", "train_head", "sweep", str(config), "seed=0,1,2", "--jobs", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, process_group=0)
    runs = [tmp_path / "runs" / f"tiny-seed={seed}" for seed in range(3)]
    wait_for(lambda: all((run / METRICS_LOG).exists() and (run / METRICS_LOG).stat().st_size for run in runs[:2]))
    send(process)
    printed, said = process.communicate()
    assert process.returncode == INTERRUPTED and said.count("to go on: ") == 1 and "failed" not in printed
    logs = [(run / LOG).read_text() for run in runs[:2]]
    assert [log.count("stopping after this step") for log in logs] == [1, 1] and "to go on: " not in "".join(logs)
    assert [(run / CHECKPOINT).exists() for run in runs] == [True, True, False]
