"""How far a stage is: lines in logs, a bar on terminals."""

from __future__ import annotations

import contextlib
import os
import select
import termios
from pathlib import Path
from typing import Any

import pytest

from cache import progress
from cache.__main__ import main
from cache.progress import StageProgress, say, with_progress
from tests.cache_samples import open_writer, write_video


def test_a_log_gets_a_line_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with StageProgress("train", unit="step", total=30, done=10) as stage:
        for step in range(1, 11):
            now += 8.0
            stage.advance()
            stage.show(loss=f"{step}.5", data_time="3 ms")
        say("a word in between")
    out, err = capsys.readouterr()
    # A step takes 8 s: the first after half a minute ends at 32 s, the first after half a minute more at 64 s.
    assert err.splitlines() == [
        "train:  47% 14/30 [00:32<02:08,  8.00s/step, loss=3.5, data_time=3 ms]",
        "train:  60% 18/30 [01:04<01:36,  8.00s/step, loss=7.5, data_time=3 ms]",
        "train:  67% 20/30 [01:20<01:20,  8.00s/step, loss=10.5, data_time=3 ms]",
    ]
    assert out == "a word in between\n"


def test_a_terminal_gets_a_bar() -> None:
    read, write = os.openpty()
    termios.tcsetwinsize(write, (24, 80))
    with os.fdopen(write, "w") as terminal, contextlib.redirect_stderr(terminal):
        assert list(with_progress("abc", "verify", unit="video")) == ["a", "b", "c"]
        shown = b""
        while b"3/3" not in shown and select.select([read], [], [], 10)[0]:  # a terminal hands on what it gets in parts
            shown += os.read(read, 10_000)
    os.close(read)
    text = shown.decode()
    assert text.startswith("\rverify:   0%|") and "\rverify: 100%|███" in text and "3/3" in text


def test_a_command_writes_no_carriage_return_into_a_pipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = open_writer(tmp_path / "a")
    for name in ("1", "2"):
        write_video(writer, name, 5)
    main(["verify", str(tmp_path / "a")])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("verify: 100% 2/2 [") and "\r" not in line


@pytest.mark.parametrize("arguments", [{"total": 5, "done": 5}, {"total": 0}, {"total": 5, "shown": False}])
def test_no_work_or_another_processes_work_is_not_shown(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with StageProgress("train", unit="step", **arguments):
        pass
    assert capsys.readouterr().err == ""
