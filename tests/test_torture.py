"""The short form of `make torture`, in a process of its own: it forks, and nothing may run in threads there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_killed_stages_end_as_if_undisturbed() -> None:
    command = [sys.executable, "-m", "tests.torture", "--kills", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = re.search(r"killed: (\d+) of extract, (\d+) of train, (\d+) of export; all ended", done.stdout)
    assert counts is not None and int(counts[1]) >= 6 and min(int(counts[2]), int(counts[3])) >= 1
