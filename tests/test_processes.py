"""Commands of several processes, and what ends in one of them ends all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import tiny_settings
from tests.fork_server import served_interpreter
from tests.test_finetune import small
from tests.test_sweep import tiny_config
from tests.test_trainer import assert_same_training
from tests.train_until import ROOT, before_step, interrupt, on_two_processes
from train_head.checkpoint import BEST, CHECKPOINT, load_checkpoint
from train_head.joint import finetune
from train_head.run_folder import read_metrics_log
from train_head.sweep import LOG
from train_head.trainer import train


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts at once; signals to its process group do not reach what it starts."""
    with served_interpreter(tmp_path_factory.mktemp("python")) as path:
        yield path


def test_two_processes_train_and_evaluate_as_one_command(
    python: Path, tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    words = ("name=two", "train.workers=0", "train.iterations=4", "train.evaluate_every=2")
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, *words)
    config = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.structured(settings), config)
    ended = on_two_processes(python, "train_head", "train", config)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("trained: ") == 1 and ended.stdout.count("settings: ") == 1
    assert "steps 0 to" not in ended.stdout + ended.stderr  # without -v
    log = read_metrics_log(tmp_path / "two")
    assert [entry["step"] for entry in log if "AP" in entry] == [2, 4]
    assert load_checkpoint(tmp_path / "two" / BEST).best_ap == max(entry["AP"] for entry in log if "AP" in entry)
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, *words, "name=one"))
    losses = [[e["loss"] for e in read_metrics_log(tmp_path / name) if "loss" in e] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_runs_killed_on_any_number_of_processes_go_on_with_any_other(
    python: Path, tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """Steps 1 and 2 on two processes, 3 and 4 on one, 5 and 6 on two; each is killed a step after its checkpoint."""
    words = ("train.batch_clips=4", "train.checkpoint_every=2", "train.workers=0")
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=whole", *words))
    broken = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=broken", *words)
    config = tmp_path / "broken.yaml"
    OmegaConf.save(OmegaConf.structured(broken), config)
    said = on_two_processes(python, "tests.train_until", 3, config).stderr
    assert (tmp_path / "broken" / CHECKPOINT).exists(), said[-4000:]
    assert load_checkpoint(tmp_path / "broken" / CHECKPOINT).step == 2
    with pytest.raises(KeyboardInterrupt), before_step(5, interrupt):
        train(broken)
    assert load_checkpoint(tmp_path / "broken" / CHECKPOINT).step == 4
    said = on_two_processes(python, "tests.train_until", 7, config).stderr
    assert load_checkpoint(tmp_path / "broken" / CHECKPOINT).step == 6, said[-4000:]
    assert_same_training(tmp_path, "whole", "broken")
    assert [entry["step"] for entry in read_metrics_log(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_fine_tune_as_one(python: Path, tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    settings = small(tiny_data, tiny_cache, tmp_path, "name=one", "train.batch_clips=2", "train.log_every=1")
    run = finetune(settings)
    ended = on_two_processes(python, "train_head", "finetune", run / "config.yaml", "name=two")
    assert ended.returncode == 0, ended.stderr[-2000:]
    alone, together = ([entry["loss"] for entry in read_metrics_log(folder)] for folder in (run, tmp_path / "two"))
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_run_that_fails_costs_the_others_nothing(
    python: Path, tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, tiny_cache, tmp_path, "name=tiny", "train.workers=0", "train.iterations=2")
    command = [python, "-m", "train_head", "sweep", config, "train.batch_clips=2,3", "train.accumulate=2"]
    log = tmp_path / "runs" / "tiny-train.batch_clips=3" / LOG
    done = subprocess.run([*command, "--jobs", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert [line.split()[:2] for line in done.stdout.splitlines()[-1:]] == [["train.batch_clips=2", "1"]]
    assert f"error: 1 of 2 runs failed: tiny-train.batch_clips=3 in `train_head train` ({log})" in done.stderr
    assert "train.batch_clips cannot be shared evenly" in log.read_text()


def test_exit_status_and_a_line_per_check(python: Path, tmp_path: Path) -> None:
    """By way of `cache`, which hands it on to `extract`."""
    command = [python, "-m", "cache", "doctor", "demo", f"data.root={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "FAIL data train" in ended.stdout and "remedy: `make demo-data`" in ended.stdout
    assert "\033" not in ended.stdout  # colours are for terminals
