"""The writing thread: the same bytes as without it, every error surfaces with its video, memory is bounded."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.background import WAITING_BATCHES, BackgroundWriter
from cache.errors import CacheError
from cache.reader import FeatureCache
from cache.writer import CacheWriter
from tests.cache_samples import attributes_of, files_below, open_writer, random_features, write_video


def write_in_background(background: BackgroundWriter, name: str, num_frames: int) -> None:
    queries, maps = random_features(num_frames)
    with background.video(name, attributes_of(num_frames)) as sink:
        for start in range(0, num_frames, 10):
            sink.append(queries[start : start + 10], maps[start : start + 10])


def shards(path: Path) -> dict[str, bytes]:
    return files_below(path, "videos/**/c.*")


def test_writes_the_same_bytes(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a")
    with BackgroundWriter(open_writer(tmp_path / "b")) as background:
        for name, length in (("1", 70), ("2", 5)):
            write_video(writer, name, length)
            write_in_background(background, name, length)
    assert len(shards(tmp_path / "a")) == 6
    assert shards(tmp_path / "b") == shards(tmp_path / "a")
    assert FeatureCache.open(tmp_path / "b").video_names() == ["1", "2"]


def test_errors_of_the_thread_surface_and_name_the_video(tmp_path: Path) -> None:
    queries, maps = random_features(10)
    maps[4, 0, 0, 0] = np.nan
    with (
        pytest.raises(CacheError, match="video '2', frame 4: mask features are not finite"),
        BackgroundWriter(open_writer(tmp_path / "a")) as background,
    ):
        write_in_background(background, "1", 5)
        with background.video("2", attributes_of(10)) as sink:
            sink.append(queries, maps)
        for name in "345":
            write_in_background(background, name, 5)
    feature_cache = FeatureCache.open(tmp_path / "a")
    assert (feature_cache.video_names(), feature_cache.incomplete()) == (["1"], ["2"])
    assert "cache writer" not in {thread.name for thread in threading.enumerate()}


def test_an_error_with_the_last_video_is_not_lost(tmp_path: Path) -> None:
    with (
        pytest.raises(CacheError, match=r"video '1': .*frames are missing .expected 6, got 5"),
        BackgroundWriter(open_writer(tmp_path / "a")) as background,
        background.video("1", attributes_of(6)) as sink,
    ):
        sink.append(*random_features(5))


def test_a_full_disk_names_the_video(tmp_path: Path) -> None:
    """A limit on the size of files gives the error of a full disk, in a process of its own."""
    code = f"""
import resource, signal
from pathlib import Path
from cache.background import BackgroundWriter
from tests.cache_samples import open_writer
from tests.test_background import write_in_background
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = open_writer(Path({str(tmp_path / "a")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
with BackgroundWriter(writer) as background:
    write_in_background(background, "7", 70)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "video '7': writing failed: " + os.strerror(errno.EFBIG) in done.stderr
    assert FeatureCache.open(tmp_path / "a").incomplete() == ["7"]


def test_a_failure_of_the_detector_leaves_the_video_uncommitted(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="detector"),
        BackgroundWriter(open_writer(tmp_path / "a")) as background,
        background.video("1", attributes_of(6)) as sink,
    ):
        sink.append(*random_features(6))
        raise RuntimeError("detector")
    assert FeatureCache.open(tmp_path / "a").incomplete() == ["1"]


def test_a_slow_disk_holds_the_detector_up(tmp_path: Path) -> None:
    """With the thread held at the video's start, no more than the queue's batches are accepted."""
    gate, accepted = threading.Event(), []
    writer = open_writer(tmp_path / "a")

    class Held(CacheWriter):
        def video(self, name, attributes):  # type: ignore[no-untyped-def]
            gate.wait(60)
            return super().video(name, attributes)

    held = Held(writer.path, writer.fingerprint, writer.codec, {}, writer.provenance)
    queries, maps = random_features(1)

    def produce() -> None:
        with BackgroundWriter(held) as background, background.video("1", attributes_of(20)) as sink:
            for number in range(20):
                sink.append(queries, maps)
                accepted.append(number)

    producer = threading.Thread(target=produce)
    producer.start()
    producer.join(0.5)
    assert len(accepted) <= WAITING_BATCHES
    gate.set()
    producer.join(60)
    assert len(accepted) == 20 and FeatureCache.open(tmp_path / "a").video_names() == ["1"]


def test_resident_memory_stays_flat_over_ten_thousand_frames(tmp_path: Path) -> None:
    """A 10,000-frame video of 170 MB must not raise the process's peak by more than a few batches."""
    queries, maps = random_features(100, num_channels=8)
    maps = np.repeat(np.repeat(maps, 2, axis=2), 2, axis=3)
    attributes = replace(attributes_of(10_000), image_hw=(64, 128), padded_hw=(64, 128))
    with BackgroundWriter(open_writer(tmp_path / "a")) as background, background.video("1", attributes) as sink:
        peaks = []
        for _ in range(100):
            sink.append(queries, maps)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    size = sum(file.stat().st_size for file in (tmp_path / "a").rglob("c.*"))
    assert size > 80e6 and (peaks[-1] - peaks[9]) * 1024 < 0.1 * size
