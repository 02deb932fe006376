"""Stage one on many GPUs and machines, on Ray: one worker a GPU, one task a video, the longest first.

The process that was called, the driver, checks everything, begins the cache and hands out videos; workers load the
detector themselves and write into the same folder, which all machines must see under the same path, as they must this
repository, the frames and the weights.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cache.errors import CacheError, ConfigError, VitaCacheError
from cache.writer import CacheWriter
from configs.schema import ExtractSettings, Settings
from extract.batches import BatchRunner
from extract.decoding import frame_decoder
from extract.detector.checkpoints import weights_sha256
from extract.detector.engines import open_detector
from extract.detector.frozen import FrameDetector
from extract.fingerprint import fingerprint
from extract.jobs import VideoJob
from extract.streaming import UNREADABLE, extract_videos, give_up

VIDEOS_AT_A_TIME = 2
"""Of a worker: one is decoded or written while the detector works on the other."""
_OBJECT_STORE_BYTES = 100_000_000  # Ray's own memory: features never pass through it


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """What decides the bits of features beside the weights; the same for every worker."""

    device: str
    precision: str
    threads: int


class VideoWorker:
    """Extracts single videos in a process of its own; what is wrong with one is returned, not raised."""

    def __init__(self, settings: Settings, equipment: Equipment) -> None:
        self._settings, self._equipment = settings, equipment
        self._runner: BatchRunner | None = None

    def prepare(self, writer: CacheWriter) -> VitaCacheError | None:
        """Load the detector, and check that it gives the features that the cache holds."""
        torch.set_num_threads(self._equipment.threads)
        chosen = self._settings.detector
        try:
            if self._runner is None:
                detector = open_detector(chosen, precision=self._equipment.precision, device=self._equipment.device)
                decode = frame_decoder(chosen.decoder, self._equipment.device)
                self._runner = BatchRunner(detector, chosen.batch_frames, decode)
            mine = fingerprint(
                self._settings, self._runner.detector, weights_sha256(Path(chosen.weights)), writer.codec
            )
            mine = replace(mine, short_edge=writer.fingerprint.short_edge)  # Of pseudo-videos it is another.
            hint = "all machines need the same weights; or another cache.path"
            writer.fingerprint.require(mine, where=f"worker on {socket.gethostname()}", hint=hint)
        except VitaCacheError as error:
            return error
        self._writer = writer
        return None

    def extract(self, job: VideoJob) -> VitaCacheError | None:
        """Extract and commit one video; nothing is left of one that cannot be read."""
        assert self._runner is not None
        torch.set_num_threads(self._equipment.threads)  # of this thread: two videos are extracted at a time
        try:
            busy = extract_videos(self._runner, self._writer, [job], lambda frames: None)
        except UNREADABLE as error:
            return give_up(self._writer, job.name, error)
        except VitaCacheError as error:
            return error
        except OSError as error:
            return CacheError(f"{error.strerror or error}", where=error.filename or f"video {job.name!r}")
        return busy.get(job.name)


def require_ray() -> Any:
    """The library `ray`. Raises ConfigError where it is not installed."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # It would report to its makers.
        import ray
    except ImportError as error:
        hint = "pip install -e '.[ray]', or leave both out: then this process extracts alone"
        raise ConfigError("extract.workers and extract.ray_address need Ray", hint=hint) from error
    return ray


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Up to `count` workers. `idle` have loaded the detector; `spawn` starts one more, where a machine has room."""

    count: int
    spawn: Callable[[], Any]
    idle: list[Any] = field(default_factory=list)

    def hire(self) -> Any:
        """An idle worker or a new one."""
        return self.idle.pop() if self.idle else self.spawn()


@contextmanager
def hired_crew(settings: Settings, detector: FrameDetector, device: str) -> Iterator[Crew]:
    """Ray actors of VideoWorker, on this machine or on the cluster at `extract.ray_address`, to the block's end.

    Raises ConfigError where the cluster is not there, or has fewer GPUs than workers are asked for.
    """
    ray = require_ray()
    equipment = Equipment(device=device, precision=detector.precision, threads=torch.get_num_threads())
    try:
        count = _connect(ray, settings.extract, equipment)
        worker = ray.remote(VideoWorker).options(
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
            max_concurrency=VIDEOS_AT_A_TIME,
            scheduling_strategy="SPREAD",
        )
        yield Crew(count=count, spawn=lambda: worker.remote(settings, equipment))
    finally:
        ray.shutdown()


def _connect(ray: Any, chosen: ExtractSettings, equipment: Equipment) -> int:
    """Start Ray here or join a cluster; returns the number of workers."""
    on_gpus = equipment.device == "cuda"
    if chosen.ray_address is None:
        count = chosen.workers or 1
        _require_gpus(count, torch.cuda.device_count() if on_gpus else count, "this machine")
        if not on_gpus and count * equipment.threads > (os.cpu_count() or 1):
            print(
                f"note: {count} workers of {equipment.threads} threads are more than {os.cpu_count()} processors; "
                "extract.threads gives each fewer (the last bits of features depend on it)"
            )
        ray.init(
            address="local",  # not a cluster that happens to be here
            num_cpus=count,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level="warning",
        )
        return count
    try:
        ray.init(address=chosen.ray_address, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "`ray start --head` prints the address; `auto` is the cluster of this machine"
        raise ConfigError(
            f"no Ray cluster: {error}", where=f"extract.ray_address={chosen.ray_address}", hint=hint
        ) from error
    gpus = int(ray.cluster_resources().get("GPU", 0)) if on_gpus else 0
    count = chosen.workers or gpus or sum(node["Alive"] for node in ray.nodes())
    _require_gpus(count, gpus if on_gpus else count, chosen.ray_address)
    return count


def _require_gpus(wanted: int, there: int, where: str) -> None:
    if wanted > there:
        raise ConfigError("a worker needs a GPU of its own", where=where, expected=f"{wanted} GPUs", got=there)
