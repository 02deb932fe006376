"""Who writes what: advisory locks, which die with their process, in files that name the host and the process.

A lock is the `flock` of a file, not of a folder: network file systems lock only what is open for writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cache.errors import FolderBusy, VideoBusy

LOCKS, ROOT_LOCK = ".locks", ".lock"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock. `run`: what all workers of one extraction share."""

    host: str
    pid: int
    since: str
    run: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_elsewhere(self) -> bool:
        """Whether it runs on another host, where its death would show nothing here."""
        return self.host != socket.gethostname()

    @classmethod
    def read(cls, file: Path) -> Owner | None:
        """The owner that a lock file names, None where it names nobody (yet)."""
        try:
            return cls(**json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


class VideoLocks:
    """The locks of a cache's videos: files `<cache>/.locks/<video>`, there only while a video is being written."""

    def __init__(self, path: Path) -> None:
        self._folder, self._held = path / LOCKS, dict[str, int]()
        self.run = uuid.uuid4().hex

    def claim(self, name: str) -> None:
        """Lock a video for this process.

        What a dead process of this host, or of this run, has left is taken over. Raises VideoBusy where another
        process is alive, or on another host.
        """
        file = self._folder / name
        descriptor = _acquire(file, wait=False)
        owner = Owner.read(file)
        if descriptor is not None and owner is not None and owner.is_elsewhere and owner.run != self.run:
            os.close(descriptor)
            descriptor = None
        if descriptor is None:
            who = "another process" if owner is None else str(owner)
            hint = "let it finish; if it died on another machine: python -m extract run CONFIG --clear-dead-locks"
            raise VideoBusy(f"another process is writing this video: {who}", where=file, hint=hint)
        self._held[name] = descriptor
        _sign(descriptor, self.run)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold a video's lock, claimed before or now, to the end of the block."""
        if name not in self._held:
            self.claim(name)
        try:
            yield
        finally:
            self.release(name)

    def release(self, name: str) -> None:
        """Give a video back."""
        _release(self._held.pop(name), self._folder / name)
        with suppress(OSError):  # There are others.
            self._folder.rmdir()

    def release_unwritten(self, names: Iterable[str]) -> None:
        """Give back those of the videos that are still held."""
        for name in names:
            if name in self._held:
                self.release(name)


def sweep_locks(path: Path, *, of_other_hosts: bool = False) -> None:
    """Remove what dead processes have left in `.locks`: those of this host, or of all hosts if asked to."""
    for file in (path / LOCKS).glob("*"):
        owner = Owner.read(file)
        if owner is not None and owner.is_elsewhere and not of_other_hosts:
            continue
        descriptor = _acquire(file, wait=False)
        if descriptor is not None:
            _release(descriptor, file)
    with suppress(OSError):
        (path / LOCKS).rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's own lock, its file `.lock`; waits for it."""
    file = folder / ROOT_LOCK
    descriptor = _acquire(file, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        _release(descriptor, file)


@contextmanager
def held_alone(folder: Path, hint: str) -> Iterator[None]:
    """Hold the same lock, or raise FolderBusy where another process has it; whatever the dead have left is no lock."""
    file = folder / ROOT_LOCK
    descriptor = _acquire(file, wait=False)
    if descriptor is None:
        raise FolderBusy(f"another process works here: {Owner.read(file) or 'unknown'}", where=folder, hint=hint)
    try:
        _sign(descriptor)
        yield
    finally:
        _release(descriptor, file)


def _sign(descriptor: int, run: str = "") -> None:
    """Write into a lock that it is this process's."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    mine = Owner(host=socket.gethostname(), pid=os.getpid(), since=since, run=run)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(mine)).encode(), 0)


def _acquire(file: Path, *, wait: bool) -> int | None:
    """Create and lock a file; None where another process has it."""
    while True:
        file.parent.mkdir(exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # Its folder was removed just now, by who released the last lock in it.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                return descriptor
        os.close(descriptor)  # Released and removed by another process between the two calls.


def _release(descriptor: int, file: Path) -> None:
    """Remove the file before the lock is dropped: who waits for it looks again."""
    file.unlink(missing_ok=True)
    os.close(descriptor)
