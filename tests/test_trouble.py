"""Locks, full disks, short memory, unreadable videos: one clear message, and what was committed stays."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Barrier
from time import sleep

import pytest
import torch
from PIL import Image
from torch import Tensor

from cache.errors import CacheError, ConfigError, FrameError, VideoBusy
from cache.fingerprint import Provenance
from cache.layout import EXTRACTION_RECORD, VIDEOS
from cache.reader import FeatureCache
from cache.storage.locks import LOCKS, Owner, VideoLocks, sweep_locks
from cache.writer import CacheWriter
from extract.batches import BatchRunner
from extract.detector.engines import open_detector
from extract.detector.frozen import FrameDetector, FrameFeatures
from extract.jobs import open_jobs
from extract.stage import extract
from extract.workers.pool import Equipment, VideoWorker
from tests.cache_samples import files_below, open_writer, write_video
from tests.conftest import tiny_settings

ROOT = Path(__file__).parent.parent


def stored_files(features: Path) -> dict[str, bytes]:
    return files_below(features, "*/videos/*/**/*")


# Locks


def foreign_lock(path: Path, name: str) -> Path:
    """As a process of another machine leaves it when it dies."""
    owner = Owner(host="node17", pid=4321, since="2026-11-22T10:00:00+00:00", run="another")
    (path / LOCKS).mkdir(parents=True)
    (path / LOCKS / name).write_text(json.dumps(asdict(owner)))
    return path / LOCKS / name


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    first, second = open_writer(tmp_path / "a"), open_writer(tmp_path / "a")
    assert first.claim("1")
    with pytest.raises(VideoBusy, match=f"process {os.getpid()} on "):
        second.claim("1")
    assert second.claim("2")
    write_video(first, "1", 4)
    write_video(second, "2", 4)
    assert not second.claim("1")  # complete
    assert not (tmp_path / "a" / LOCKS).exists()


def test_threads_that_share_a_writer_keep_their_own_claims(tmp_path: Path) -> None:
    writer, other = open_writer(tmp_path / "a"), open_writer(tmp_path / "a")
    in_turn = Barrier(2)

    def extraction(name: str) -> None:
        with writer.claims() as claim:
            assert claim(name)
            in_turn.wait(10)
            if name == "1":  # Leaves its block, unwritten, while the other thread still has its video to write.
                return
            while (tmp_path / "a" / LOCKS / "1").exists():
                sleep(0.001)
            with pytest.raises(VideoBusy):
                other.claim(name)
            write_video(writer, name, 4)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(extraction, ("1", "2")))
    assert other.pending(["1", "2"]) == ["1"] and other.claim("1")


def test_a_lock_of_another_machine_is_respected_until_it_is_said_to_be_dead(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a")
    file = foreign_lock(tmp_path / "a", "1")
    with pytest.raises(VideoBusy, match=r"process 4321 on node17, since 2026(.|\n)*--clear-dead-locks"):
        writer.claim("1")
    sweep_locks(tmp_path / "a")
    assert file.exists()
    sweep_locks(tmp_path / "a", of_other_hosts=True)
    assert not file.exists() and writer.claim("1")


def test_locks_of_dead_processes_of_this_machine_are_swept(tmp_path: Path) -> None:
    code = "import os, pathlib, sys; from cache.storage.locks import VideoLocks; VideoLocks(pathlib.Path(sys.argv[1])).claim('1'); os._exit(1)"  # noqa: E501
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=False)
    assert (tmp_path / LOCKS / "1").exists()
    sweep_locks(tmp_path)
    assert not (tmp_path / LOCKS).exists()
    VideoLocks(tmp_path).claim("1")
    sweep_locks(tmp_path)
    assert (tmp_path / LOCKS / "1").exists()  # alive


def test_an_extraction_leaves_to_others_what_they_write(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "features"
    foreign_lock(features / "train", "2")
    with pytest.raises(VideoBusy, match="1 videos are being extracted by others, such as train/2"):
        extract(tiny_settings(tiny_data, features, tmp_path))
    assert FeatureCache.open(features / "train").video_names() == ["1", "3", "4", "5"]
    assert len(FeatureCache.open(features / "valid").video_names()) == 2
    said = capsys.readouterr().err
    assert "1 of 5 videos (6 frames" in said and said.count("process 4321 on node17") == 1
    assert "goes on from here" not in said
    extract(tiny_settings(tiny_data, features, tmp_path), clear_dead_locks=True)
    assert stored_files(features) == stored_files(tiny_cache)


# Videos that cannot be read


def test_unreadable_videos_are_skipped_by_name(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    data, features = tmp_path / "data", tmp_path / "features"
    shutil.copytree(tiny_data, data)
    frames = data / "train" / "JPEGImages"
    names = {video["id"]: video["file_names"] for video in json.loads((data / "train.json").read_text())["videos"]}
    (frames / names[2][3]).write_bytes(b"")
    (frames / names[4][0]).unlink()
    Image.new("RGB", (3, 5)).save(frames / names[5][5])  # changed after the labels were made
    with pytest.raises(FrameError, match="frames named by the labels are not there"):
        extract(tiny_settings(data, features, tmp_path))
    skipping = tiny_settings(data, features, tmp_path, "extract.skip_errors=true")
    with pytest.raises(FrameError, match=r"3 videos were skipped, such as train/2(.|\n)*allow_skipped"):
        extract(skipping)
    skipped = json.loads((features / "train" / "skipped.json").read_text())
    assert list(skipped) == ["2", "4", "5"]
    assert [words in skipped[name] for name, words in (("2", "image"), ("4", "no such"), ("5", "size"))] == [True] * 3
    assert sorted(entry.name for entry in (features / "train" / VIDEOS).iterdir()) == ["1", "3", "zarr.json"]
    skipping.extract.allow_skipped = True
    extract(skipping)
    shutil.copytree(tiny_data, data, dirs_exist_ok=True)
    extract(tiny_settings(data, features, tmp_path))
    assert stored_files(features) == stored_files(tiny_cache)
    assert not (features / "train" / "skipped.json").exists()


def test_a_session_that_fails_counts_and_a_worker_leaves_nothing_of_what_it_cannot_read(
    tiny_data: Path, tmp_path: Path
) -> None:
    data, features = tmp_path / "data", tmp_path / "features"
    shutil.copytree(tiny_data, data)
    video = json.loads((data / "train.json").read_text())["videos"][3]
    broken = data / "train" / "JPEGImages" / video["file_names"][5]
    broken.write_bytes(b"")
    settings = tiny_settings(data, features, tmp_path, "detector.batch_frames=2")
    with pytest.raises(FrameError, match="not a readable image"):
        extract(settings, only=["train"])
    record = json.loads((features / "train" / EXTRACTION_RECORD).read_text())
    complete = len(FeatureCache.open(features / "train").video_names())
    assert 6 * complete < record["frames"] < 30 and record["seconds"] > 0
    folder = features / "train" / VIDEOS / str(video["id"])
    assert folder.exists()
    worker = VideoWorker(settings, Equipment(device="cpu", precision="float32", threads=1))
    held = FeatureCache.open(features / "train")
    assert worker.prepare(CacheWriter(held.path, held.fingerprint, held.codec, {}, Provenance.gather())) is None
    (asked,) = open_jobs(settings, ["train"])
    assert isinstance(worker.extract(next(job for job in asked.jobs if job.name == folder.name)), FrameError)
    assert not folder.exists()


# Memory


class Hungry:
    """A detector that has room for few frames at a time."""

    def __init__(self, detector: FrameDetector, room: int, error: type[Exception] = RuntimeError) -> None:
        self.detector, self.room, self.error = detector, room, error
        self.seen: list[int] = []

    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        self.seen.append(len(images_BCHW))
        if len(images_BCHW) > self.room:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return self.detector.features(images_BCHW)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_batches_are_halved_where_memory_is_short(
    tiny_data: Path, tmp_path: Path, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    detector = open_detector(tiny_settings(tiny_data, tmp_path, tmp_path).detector, precision="float32", device="cpu")
    images = torch.randint(0, 256, (7, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    hungry = Hungry(detector, 2, error)
    runner = BatchRunner(hungry, 8)  # type: ignore[arg-type]
    features = runner.features(images)
    assert hungry.seen == [8, 4, 2, 2, 2, 2]
    whole = BatchRunner(detector, 8).features(images)
    torch.testing.assert_close(features.mask_features_BCHW, whole.mask_features_BCHW, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.frame_queries_BLQC, whole.frame_queries_BLQC, rtol=1e-5, atol=1e-5)
    runner.features(images)
    said = capsys.readouterr().err
    assert said.count("out of memory") == 2 and "detector.batch_frames=2" in said
    with pytest.raises(ConfigError, match="needs more for one frame of 96x64"):
        BatchRunner(Hungry(detector, 0), 8).features(images)  # type: ignore[arg-type]


def test_other_failures_of_the_detector_are_not_taken_for_lack_of_memory() -> None:
    class Broken:
        def features(self, images_BCHW: Tensor) -> FrameFeatures:
            raise RuntimeError("expected scalar type Half")

    with pytest.raises(RuntimeError, match="Half"):
        BatchRunner(Broken(), 8).features(torch.zeros((1, 3, 8, 8)))  # type: ignore[arg-type]


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_and_a_read_only_disk_keep_what_was_committed(
    small_disk: Path, tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = small_disk / "features"
    settings = tiny_settings(tiny_data, features, tmp_path, "cache.ignore_space=true")
    with pytest.raises(CacheError, match=r"No space left on device(.|\n)*goes on from here"):
        extract(settings)
    assert re.search(r"\d of 5 videos \(\d+ frames.*\) are not in the cache yet", capsys.readouterr().err)
    complete = FeatureCache.open(features / "train").video_names()
    assert 0 < len(complete) < 5
    expected = stored_files(tiny_cache)
    for name in complete:
        stored = {file: content for file, content in stored_files(features).items() if f"/{name}/" in file}
        assert stored and stored.items() <= expected.items()
    remount(small_disk, "size=64m,ro")
    with pytest.raises(CacheError, match="features cannot be written"):
        extract(settings)
    remount(small_disk, "size=64m,rw")
    extract(settings)
    assert stored_files(features) == expected


def test_everything_is_on_disk_before_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        happened.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        happened.append(("replace", str(target)))
        return replace(self, target)

    writer = open_writer(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_video(writer, "1", 70)
    folder = tmp_path / "a" / VIDEOS / "1"
    marker = max(index for index, event in enumerate(happened) if event == ("replace", str(folder / "zarr.json")))
    before = {path for what, path in happened[:marker] if what == "fsync"}
    assert {str(path) for path in folder.rglob("*")} - {str(folder / "zarr.json")} <= before
    assert ("fsync", str(folder)) in happened[marker:]


def test_a_run_takes_over_what_its_own_dead_workers_left_on_other_hosts(tmp_path: Path) -> None:
    locks = VideoLocks(tmp_path)
    (tmp_path / LOCKS).mkdir()
    for name, run in {"mine": locks.run, "theirs": "another"}.items():
        owner = Owner(host="node17", pid=4321, since="2026-11-22T10:00:00+00:00", run=run)
        (tmp_path / LOCKS / name).write_text(json.dumps(asdict(owner)))
    locks.claim("mine")
    with pytest.raises(VideoBusy, match="process 4321 on node17"):
        locks.claim("theirs")
    locks.release("mine")
