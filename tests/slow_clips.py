"""As `python -m tests.slow_clips`: a SIGTERM to all processes while a worker reads clips; prints how many arrive."""

from __future__ import annotations

import os
import signal
import time

import torch

from train_head.data.clip_loader import Empty, load_clips
from train_head.stopping import StopRequest, start_worker_server


class SlowClips:
    """Reads a number in a twentieth of a second, so that the trainer waits for every one."""

    clip_bytes = 0

    def read(self, index: int, empty: Empty) -> int:
        """Clip `index`."""
        time.sleep(0.05)
        return index


if __name__ == "__main__":
    start_worker_server()
    with StopRequest() as stop:
        clips = load_clips(SlowClips(), range(20), workers=1, held=1, device=torch.device("cpu"))
        next(clips)
        os.killpg(0, signal.SIGTERM)
        print(1 + len(list(clips)), stop.requested)
