"""Training as a user starts it: stopped by signals that all its processes get, on two processes, short of memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cache.command import INTERRUPTED, run_command
from cache.errors import ConfigError
from tests.conftest import tiny_settings
from tests.train_until import ROOT
from train_head import trainer
from train_head.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from train_head.run_folder import METRICS_LOG, read_metrics_log
from train_head.stopping import StopRequest
from train_head.trainer import train

STEPS = 40


def stopped(command: str, number: signal.Signals, log: Path) -> str:
    """What a command says that gets a signal, with all of its processes, when it has logged another step."""
    seen = len(read_metrics_log(log.parent))
    started = subprocess.Popen(
        command,
        shell=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while started.poll() is None and len(read_metrics_log(log.parent)) <= seen:
        time.sleep(0.01)
    os.killpg(started.pid, number)
    said = started.communicate()[0]
    assert started.returncode == INTERRUPTED, said
    return str(said)


def test_a_stopped_command_goes_on_to_the_bytes_of_an_undisturbed_run(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as these tests; other numbers of threads add up in another order
    words = (f"train.iterations={STEPS}", "train.workers=1", "train.checkpoint_every=1000")
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=stopped", *words)
    config = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.structured(settings), config)
    run = tmp_path / "stopped"
    command = f"exec {sys.executable} -m train_head train {config} -v"
    said = stopped(command, signal.SIGINT, run / METRICS_LOG)
    assert said.count("stopping after this step, with a checkpoint") == 1 and "Traceback" not in said
    step = load_checkpoint(run / CHECKPOINT).step
    assert 0 < step < STEPS and f"{run}, steps 0 to {STEPS}; " in said
    going_on = re.search("^stopped; to go on: (.*)$", said, re.MULTILINE)
    assert going_on is not None
    ended = subprocess.run(going_on[1], shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{run}, steps {step} to {STEPS}; " in ended.stderr and ended.stdout.count("trained: ") == 1
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=whole", *words))
    whole, resumed = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped"))
    assert resumed.step == STEPS
    assert all(torch.equal(whole.head[key], resumed.head[key]) for key in whole.head)
    losses = [[entry["loss"] for entry in read_metrics_log(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]


def test_a_signal_within_the_handler_of_another_is_no_second_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep passes on what its runs have got already; a call is where Python may take the next signal up."""
    stop, clock = StopRequest(), time.monotonic

    def interrupted() -> float:
        monkeypatch.setattr(time, "monotonic", clock)
        signal.raise_signal(signal.SIGTERM)
        return clock()

    with stop:
        monkeypatch.setattr(time, "monotonic", interrupted)
        signal.raise_signal(signal.SIGINT)
    assert stop.requested and capsys.readouterr().out.count("stopping after this step") == 1


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.requested and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_during_the_last_checkpoint_loses_nothing(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(path: Path, checkpoint: Checkpoint) -> None:
        signal.raise_signal(signal.SIGINT)
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr(trainer, "save_checkpoint", signalled)
    words = ("name=last", "train.workers=0", "train.iterations=2", "train.checkpoint_every=2")
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, *words))
    assert load_checkpoint(tmp_path / "last" / CHECKPOINT).step == 2


def test_data_workers_outlive_a_sigterm_to_all() -> None:
    """As a cluster sends it at the end of a job's time: the trainer needs its clips to end the step."""
    words = [sys.executable, "-m", "tests.slow_clips"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, start_new_session=True, check=False)
    assert ended.stdout.splitlines()[-1:] == ["20 True"], ended.stderr


def test_evaluation_while_training_is_refused_before_the_first_step(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    words = ("name=early", "train.evaluate_every=2", "evaluate.split=holdout")
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        train(tiny_settings(tiny_data, tiny_cache, tmp_path, *words), lambda: 0.5)
    assert not (tmp_path / "early").exists()


def test_training_out_of_memory_names_what_to_lower(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(
        tiny_data, tiny_cache, tmp_path, "name=large", "train.workers=0", "loss.num_points=10000000000000"
    )

    def command() -> int:
        train(settings)
        return 0

    assert run_command(command) == 2
    assert "train.accumulate" in capsys.readouterr().err
