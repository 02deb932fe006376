"""`torchrun ... -m tests.train_until STEP CONFIG key=value ...`: training that is killed on reaching a step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from configs.load import load_settings
from train_head.trainer import Trainer, train


def main() -> None:
    stop, config, *overrides = sys.argv[1:]
    original = Trainer.training_step

    def killed(self: Trainer[Any], clips: Any) -> Any:
        if self.progress.step == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, clips)

    Trainer.training_step = killed  # type: ignore[method-assign]
    train(load_settings(config, overrides))


if __name__ == "__main__":
    main()
