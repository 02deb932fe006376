"""Extraction on real Ray clusters of this machine, whose workers and machines die on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cache.errors import ConfigError
from cache.reader import FeatureCache
from cache.storage.locks import LOCKS, Owner
from extract.stage import extract
from tests.cache_samples import files_below
from tests.conftest import tiny_settings

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that takes no work and two machines of one processor each."""
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(2):
            started.add_node(num_cpus=1, **small)
        started.wait_for_nodes()
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def stored_files(features: Path) -> dict[str, bytes]:
    """Every file of every video of both splits."""
    return files_below(features, "*/videos/*/**/*")


def when_a_video_is_being_written(features: Path, act: Callable[[int], None]) -> threading.Thread:
    """Call `act` once, with the process that writes the first train video anybody claims."""

    def watch() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            owners = [Owner.read(file) for file in (features / "train" / LOCKS).glob("*")]
            if owners and owners[0] is not None:
                act(owners[0].pid)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_worker_is_killed_and_the_arrays_are_those_of_one_process(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, killed = tmp_path / "features", list[int]()

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    watcher = when_a_video_is_being_written(features, kill)
    extract(tiny_settings(tiny_data, features, tmp_path, "extract.workers=2"))
    watcher.join()
    assert killed and killed[0] != os.getpid()
    assert stored_files(features) == stored_files(tiny_cache)
    assert len(FeatureCache.open(features / "train").root.sessions) == 1
    assert not (features / "train" / LOCKS).exists()
    assert "30/30" in capsys.readouterr().err  # frames of the train split, in one bar


@pytest.mark.slow
def test_a_machine_dies_and_others_do_its_videos(
    cluster: Cluster, tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    features, dead = tmp_path / "features", list[str]()

    def remove_machine_of(pid: int) -> None:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        for node in cluster.worker_nodes:
            if node.all_processes["raylet"][0].process.pid == parent:
                dead.append(node.node_id)
                cluster.remove_node(node, allow_graceful=False)
                return

    watcher = when_a_video_is_being_written(features, remove_machine_of)
    extract(tiny_settings(tiny_data, features, tmp_path, f"extract.ray_address={cluster.address}"))
    watcher.join()
    assert len(dead) == 1
    assert stored_files(features) == stored_files(tiny_cache)


def test_without_a_cluster_there_is_one_error(tiny_data: Path, tmp_path: Path) -> None:
    to_s3 = tiny_settings(tiny_data, "s3://bucket/x", tmp_path, "extract.workers=2")
    with pytest.raises(ConfigError, match="workers do not write to an address"):
        extract(to_s3)
