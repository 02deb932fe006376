"""Ctrl-C, or a cluster's SIGTERM, while training: the step is finished first, so that nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from multiprocessing import forkserver, resource_tracker
from types import FrameType, TracebackType

from cache.progress import is_main, say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_REQUEST = 1.0  # seconds: a terminal or a cluster signals all processes, and a sweep or torchrun passes it on


class StopRequest:
    """Notes the first signal instead of ending the process; a later one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.requested = False
        self._since: float | None = None

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            # Shells have what they start in the background ignore Ctrl-C.
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        requested, self.requested = self.requested, True  # without a call in between, where another signal may come
        if not requested:
            self._since = time.monotonic()
            if is_main():
                say("stopping after this step, with a checkpoint; once more to stop at once")
        elif self._since is not None and time.monotonic() >= self._since + _ONE_REQUEST:
            raise KeyboardInterrupt


def ignore_interrupts(_: int) -> None:
    """Let a data worker outlive Ctrl-C and SIGTERM, which all processes get: the trainer still needs its clips."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_worker_server() -> None:
    """Start the process that data workers are forked from, deaf to SIGTERM as it is to Ctrl-C: they end without it."""
    resource_tracker.ensure_running()  # first: starting it may unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
