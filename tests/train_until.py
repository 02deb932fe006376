"""Training that is stopped: as `torchrun ... -m tests.train_until STEP CONFIG key=value ...`, killed at a step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.load import load_settings
from train_head.trainer import Trainer, train

ROOT = Path(__file__).parent.parent


@contextmanager
def before_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Within, `act` is called when training comes to the step of this number."""
    original = Trainer.training_step

    def acting(self: Trainer[Any], clips: Any) -> Any:
        if self.progress.step == step:
            act()
        return original(self, clips)

    Trainer.training_step = acting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.training_step = original  # type: ignore[method-assign]


def interrupt() -> None:
    """Stop at once, as a second Ctrl-C."""
    raise KeyboardInterrupt


def on_two_processes(python: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`torchrun -m WORDS` with two processes of an interpreter on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", "-m", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def main() -> None:
    step, config, *overrides = sys.argv[1:]
    with before_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train(load_settings(config, overrides))


if __name__ == "__main__":
    main()
