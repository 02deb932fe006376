"""What all command lines share: settings announced, errors in a line, Ctrl-C at a safe point, logs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cache.command import INTERRUPTED, PART_OF, run_command
from cache.errors import ConfigError, VideoBusy
from configs.changes import changed_settings, in_words
from configs.load import load_settings
from configs.schema import Settings
from tests.conftest import tiny_settings
from train_head import trainer
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.data.clips import Clip
from train_head.run_folder import BOARD, read_metrics_log
from train_head.step import StepLosses
from train_head.trainer import train

ROOT = Path(__file__).parent.parent


def failing(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("no such thing", where="a.yaml", hint="look"), 2, "error: a.yaml: no such thing\n  hint: look\n"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2, "error: x.json: No such file or directory\n"),
        (VideoBusy("2 videos are written by others"), 75, "error: 2 videos are written by others\n"),
        (KeyError("boxes"), 1, "error: KeyError: 'boxes'\n  hint: not a mistake of yours"),
    ],
)
def test_errors_are_a_line_and_a_hint(
    error: Exception, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: failing(error)) == status
    quiet = capsys.readouterr().err
    assert quiet.startswith(message) and "Traceback" not in quiet and "\033" not in quiet  # no terminal, no colours
    assert run_command(lambda: failing(error), verbose=True) == status
    loud = capsys.readouterr().err
    assert "Traceback" in loud and "in failing" in loud and quiet in loud


def test_a_stopped_command_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> int:
        raise KeyboardInterrupt

    monkeypatch.delenv("MAKE_TYPED", raising=False)  # of `make test`
    monkeypatch.setattr(sys, "orig_argv", ["/a b/python", "-m", "train_head", "train", "demo", "data.views=[]"])
    assert run_command(stopped) == INTERRUPTED
    assert "'/a b/python' -m train_head train demo 'data.views=[]'\n" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to tell of the other's end")
def test_a_command_ends_with_the_one_that_started_it() -> None:
    sleep = "lambda: print(1, flush=True) or time.sleep(60)"
    member = f"import time; from cache.command import run_command; run_command({sleep})"
    killed = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {member!r}])"
    environment = {**os.environ, PART_OF: "sweep"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", killed], cwd=ROOT, env=environment, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.kill()
        assert select.select([process.stdout], [], [], 10)[0]  # its end: nobody can write any more
        assert process.stdout.read() == b""


def test_a_clusters_sigterm_does_what_ctrl_c_does() -> None:
    def stopped() -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run_command(stopped) == INTERRUPTED
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_started_by_make_it_names_the_make_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$MAKE_TYPED"\nexit 130\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    words = ["make", "predict", f"VENV={tmp_path}", f"OUTPUT={tmp_path}", "VIDEO=my clip.mp4"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(words, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    monkeypatch.setenv("MAKE_TYPED", done.stdout)
    failing_with = {KeyboardInterrupt(): "make predict 'VIDEO=my clip.mp4' OUTPUT=", KeyError("x"): "with V=1 shows"}
    for error, said in failing_with.items():

        def fail(error: BaseException = error) -> int:
            raise error

        run_command(fail)
        assert said in capsys.readouterr().err  # no folder that make has deleted by then


def test_settings_are_told_as_they_differ_from_the_defaults(tmp_path: Path) -> None:
    assert changed_settings(Settings()) == {}
    words = ["name=other", "detector.short_edge=null", "train.decay_steps=[1,2]", "cache.codec=int8"]
    words += ["data.views=[{flip: true}, {crop: 0.5, short_edge: 64}]", "train.mix=[{cache: a b/c}]", "data.root='7'"]
    words += ["runs='a: {b'", "train.learning_rate=1e-5", "train.compile=true"]
    settings = load_settings("demo", words)
    assert changed_settings(settings)["train.decay_steps"] == [1, 2]
    said = in_words(settings)
    assert all(word in said for word in ("name=other", "detector.short_edge=null", "cache.codec=int8"))
    again = subprocess.run(["bash", "-c", f"printf '%s\\n' {said}"], capture_output=True, text=True, check=True)
    (tmp_path / "empty.yaml").write_text("{}")
    assert load_settings(str(tmp_path / "empty.yaml"), again.stdout.splitlines()) == settings


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_as_if_nothing_had_been(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=stopped")
    original = trainer.Trainer.training_step

    def interrupted(self: trainer.Trainer[Clip], clips: Sequence[Clip]) -> StepLosses:
        if self.progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, clips)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(tmp_path / "stopped" / CHECKPOINT).step == 2
    train(settings)
    whole = load_checkpoint(Path(tiny_run.runs) / tiny_run.name / CHECKPOINT)
    resumed = load_checkpoint(tmp_path / "stopped" / CHECKPOINT)
    assert resumed.step == whole.step
    assert all(torch.equal(whole.head[key], resumed.head[key]) for key in whole.head)


def test_tensorboard_has_what_the_log_has(tiny_run: Settings) -> None:
    run = Path(tiny_run.runs) / tiny_run.name
    board = EventAccumulator(str(run / BOARD))
    board.Reload()
    log = read_metrics_log(run)
    logged = {entry["step"]: entry["loss"] for entry in log}
    assert {event.step: event.value for event in board.Scalars("loss")} == pytest.approx(logged)
