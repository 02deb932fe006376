"""Writing in a thread of its own, so that the detector never waits for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CacheError
from cache.layout import VideoAttributes
from cache.writer import CacheWriter

WAITING_BATCHES = 2
"""Together with the one being written, all that is in memory."""


@dataclass(frozen=True, kw_only=True)
class _Begin:
    name: str
    attributes: VideoAttributes


@dataclass(frozen=True, kw_only=True)
class _Batch:
    frame_queries: NDArray[np.floating[Any]]
    mask_features: NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class _End:
    committed: bool


class _Abandoned(Exception):
    """Leaves a video's folder without its commit marker."""


class BackgroundWriter:
    """A CacheWriter whose encoding, checking, writing and committing happen elsewhere, in order.

    What goes wrong there is raised by the next call here, or at the end of the `with` block, and names the
    video. Nothing is written after an error. Batches wait in a queue of WAITING_BATCHES: a slow disk holds the
    caller up, and memory is bounded.
    """

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue[_Begin | _Batch | _End | None] = queue.Queue(WAITING_BATCHES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cache writer")

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    @contextmanager
    def video(self, name: str, attributes: VideoAttributes) -> Iterator[BackgroundWriter]:
        """As CacheWriter.video, but the commit happens some time after the block is left."""
        self._put(_Begin(name=name, attributes=attributes))
        committed = False
        try:
            yield self
            committed = True
        finally:
            self._queue.put(_End(committed=committed))

    def append(
        self, frame_queries_TLQC: NDArray[np.floating[Any]], mask_features_TCHW: NDArray[np.floating[Any]]
    ) -> None:
        """Queue the next frames of the video; see VideoSink.append. Arrays must not be changed afterwards.

        Raises what an earlier batch or video met.
        """
        self._put(_Batch(frame_queries=frame_queries_TLQC, mask_features=mask_features_TCHW))

    def _put(self, message: _Begin | _Batch) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(message)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            if self._error is None and isinstance(message, _Begin):
                self._error = self._write(message)

    def _write(self, begin: _Begin) -> BaseException | None:
        """Write one video; returns what went wrong."""
        try:
            with self._writer.video(begin.name, begin.attributes) as sink:
                while isinstance(message := self._queue.get(), _Batch):
                    sink.append(message.frame_queries, message.mask_features)
                if not (isinstance(message, _End) and message.committed):
                    raise _Abandoned
        except _Abandoned:
            return None
        except OSError as error:
            what, where = f"writing failed: {error.strerror or error}", f"{self._writer.path}: video {begin.name!r}"
            failure = CacheError(what, where=where, hint="mend that, then run the same command: it goes on from here")
            failure.__cause__ = error
            return failure
        except BaseException as error:  # Not lost in a thread: raised by the next call.
            error.add_note(f"while writing video {begin.name!r} of {self._writer.path}")
            return error
        return None
