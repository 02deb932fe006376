"""Handing videos out to workers on Ray, the longest first, and again where a worker or its machine dies."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from cache.errors import CacheError, VideoBusy, VitaCacheError
from cache.writer import CacheWriter
from extract.jobs import VideoJob
from extract.streaming import UNREADABLE, Advance, Outcome
from extract.workers.pool import VIDEOS_AT_A_TIME, Crew, require_ray

MAX_DEATHS = 3
"""So many workers may die over one video; then it is given up."""
_PATIENCE = 600.0  # seconds without any worker


class Dispatch:
    """The videos of one cache on their way through a crew. No video is ever with two workers."""

    def __init__(self, crew: Crew, writer: CacheWriter, jobs: Sequence[VideoJob], advance: Advance) -> None:
        self._ray, self._crew, self._advance = require_ray(), crew, advance
        writer.record_session()  # Workers write videos alone.
        self._writer = self._ray.put(writer)
        self._waiting = deque(sorted(jobs, key=lambda job: len(job.files), reverse=True))
        self._starting: dict[Any, Any] = {}
        self._running: dict[Any, tuple[Any, VideoJob]] = {}
        self._ready: list[Any] = []
        self._deaths: Counter[str] = Counter()
        self._outcome = Outcome()

    def run(self, *, skip_errors: bool) -> Outcome:
        """Extract all videos. Raises what is wrong with a video, unless it may be skipped."""
        for _ in range(min(self._crew.count, len(self._waiting))):
            self._hire()
        while self._waiting or self._running:
            pending = [*self._starting, *self._running]
            done, _ = self._ray.wait(pending, timeout=None if self._running else _PATIENCE)
            if not done:
                raise CacheError("no worker has started for 10 minutes", hint="`ray status` tells what they wait for")
            for reference in done:
                self._take(reference, skip_errors=skip_errors)
            self._hand_out()
        for worker in self._starting.values():
            self._ray.kill(worker)
        self._crew.idle.extend(self._ready)
        return self._outcome

    def _hire(self) -> None:
        worker = self._crew.hire()
        self._starting[worker.prepare.remote(self._writer)] = worker

    def _take(self, reference: Any, *, skip_errors: bool) -> None:
        """Note what a worker has done."""
        worker, job = self._running.pop(reference, None) or (self._starting.pop(reference), None)
        try:
            error: VitaCacheError | None = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as death:
            error = self._after_death(worker, job, death)
            if error is None:
                return
        if job is None:
            if error is not None:
                raise error
            self._ready.append(worker)
        elif isinstance(error, VideoBusy):
            self._outcome.busy[job.name] = error
        elif error is not None:
            if not (skip_errors and isinstance(error, UNREADABLE)):
                raise error
            self._outcome.skipped[job.name] = error
        else:
            self._advance(len(job.files))

    def _after_death(self, worker: Any, job: VideoJob | None, death: Exception) -> VitaCacheError | None:
        """Replace a dead worker and let others do its videos; returns an error where too many have died of one."""
        if worker in self._ready:
            self._ready.remove(worker)
            self._hire()
        what = "worker" if job is None else f"video {job.name!r}"
        self._deaths[what] += 1
        if self._deaths[what] > MAX_DEATHS:
            return CacheError(f"{self._deaths[what]} workers have died: {death}", where=what, hint="too little memory?")
        if job is None:
            self._hire()
        else:
            self._waiting.append(job)
        return None

    def _hand_out(self) -> None:
        while self._waiting and self._ready:
            worker = min(self._ready, key=lambda candidate: len(self._with(candidate)))
            if not self._has_room(worker):
                return
            job = self._waiting.popleft()
            self._running[worker.extract.remote(job)] = (worker, job)

    def _with(self, worker: Any) -> list[VideoJob]:
        return [job for other, job in self._running.values() if other is worker]

    def _has_room(self, worker: Any) -> bool:
        """A video that a worker died of has the next one for itself, to show whether it was the reason."""
        held = self._with(worker)
        suspect = any(self._deaths[f"video {job.name!r}"] for job in (*held, self._waiting[0]))
        return len(held) < (1 if suspect else VIDEOS_AT_A_TIME)
