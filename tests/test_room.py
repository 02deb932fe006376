"""What an extraction will need: the estimate against what is written, and the refusal to begin without room."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.__main__ import main as cache_main
from cache.errors import CacheError
from cache.labels.annotations import load_labels
from cache.layout import View
from cache.reader import FeatureCache
from cache.remote_writer import LOCAL_VIDEOS
from cache.upkeep.transfer import export_hdf5
from configs.splits import SplitPaths
from extract.__main__ import main as extract_main
from extract.batches import BatchRunner
from extract.detector.frozen import FrameFeatures
from extract.estimate import _duration, seconds_per_pixel
from extract.jobs import SplitJobs, video_job
from extract.room import FrameCost, Workload, stored_bytes
from extract.stage import extract
from tests.cache_samples import labels_of, open_writer, write_video
from tests.conftest import tiny_settings
from tests.object_store import local_s3

Usage = namedtuple("Usage", "total used free")


def workload(tmp_path: Path, lengths: dict[int, int]) -> Workload:
    file = tmp_path / "labels.json"
    document = json.loads(labels_of(lengths)) | {"categories": [{"id": 1, "name": "cat"}]}
    file.write_text(json.dumps(document))
    split = SplitPaths(name="train", labels=file, frames=tmp_path, features=tmp_path / "a")
    jobs = tuple(video_job(video, View(), tmp_path, None) for video in load_labels(file).videos)
    return Workload.of(SplitJobs(split=split, labels_json=b"", jobs=jobs, short_edge=None))


def test_bytes_and_hours_by_hand(tmp_path: Path) -> None:
    """Frames of 48 x 80 without resizing, padded to 64 x 96, so maps of 13 x 21 are kept of 16 x 24."""
    cost = FrameCost(query_bytes=3 * 4 * 6 * 2, channels=6)
    work = workload(tmp_path, {1: 5, 2: 7})
    videos = [job.attributes for job in work.jobs]
    assert stored_bytes(videos, 6 * 2, cost) == 12 * (144 + 13 * 21 * 6 * 2)
    assert _duration(videos, 1e-6) == "0.1 seconds" and _duration(videos, 0.1) == "2.0 hours"


def test_videos_in_the_cache_are_not_counted(tmp_path: Path) -> None:
    write_video(open_writer(tmp_path / "a"), "1", 5)
    assert workload(tmp_path, {1: 5, 2: 7}).frames == 7


def test_only_added_videos_are_extracted(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A label file that grew by a video: the others keep their files, down to the inode."""
    whole = json.loads((tiny_data / "valid.json").read_text())
    last = whole["videos"][-1]["id"]
    fewer = {
        **whole,
        "videos": whole["videos"][:-1],
        "annotations": [track for track in whole["annotations"] if track["video_id"] != last],
    }
    (tmp_path / "valid.json").write_text(json.dumps(fewer))
    settings = tiny_settings(tiny_data, tmp_path / "features", tmp_path, f"data.valid_labels={tmp_path / 'valid.json'}")
    extract(settings, only=["valid"])
    assert str(last) not in FeatureCache.open(tmp_path / "features/valid").video_names()
    old = {file: file.stat().st_ino for file in (tmp_path / "features/valid/videos").glob("*/*/c.*")}
    (tmp_path / "valid.json").write_text(json.dumps(whole))
    extract(settings, only=["valid"])
    assert {file: file.stat().st_ino for file in old} == old
    for file in (tiny_cache / "valid/videos").glob("*/*/c.*"):
        assert (tmp_path / "features/valid" / file.relative_to(tiny_cache / "valid")).read_bytes() == file.read_bytes()


# The estimate


def feature_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("videos/*/*/c.*"))


def test_the_estimate_is_what_is_written(
    tiny_data: Path,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"data.root={tiny_data}", f"cache.path={tmp_path / 'none'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["extract", "estimate", "demo", *words])
    assert extract_main() == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    blocks = re.findall(r"^(\w+): (\d+) videos, (\d+) frames, [\d.]*[1-9][\d.]* \w+\n((?:[* ] .*\n)+)", printed, re.M)
    assert [(name, videos, frames) for name, videos, frames, _ in blocks] == [
        ("train", "5", "30"),
        ("valid", "2", "12"),
    ]
    words = ["cache.codec=spectral", "cache.calibration_frames=12"]
    extract(tiny_settings(tiny_data, tmp_path / "spectral", tmp_path, *words), only=["train"])
    said = {
        row: float(size)
        for row, size in re.findall(r"^[* ] (.*?)  +[\d.]+ GB, ([\d.]+) MB a frame", blocks[0][3], re.M)
    }
    assert list(said)[:4] == ["float16", "int8", "logit 1/128", "spectral 1/128"]
    assert list(said)[4].startswith("auto: ")
    assert re.findall(r"^\* (\w+ [\d/]+) ", printed, re.M) == ["spectral 1/128"] * 3  # of the table, and of each split
    assert said["float16"] == pytest.approx(feature_bytes(tiny_cache / "train") / 30e6, rel=0.02)
    assert said["spectral 1/128"] == pytest.approx(feature_bytes(tmp_path / "spectral" / "train") / 30e6, rel=0.1)
    assert re.search(r"^free: [\d.]+ GB at ", printed, re.M)


def test_the_cache_passes_the_question_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert cache_main(["estimate", "nowhere"]) == 2
    assert "nowhere: no such config" in capfd.readouterr().err


@pytest.mark.parametrize("batch_frames", [1, 8, 20, 32])
def test_20_frames_are_timed_in_full_batches(tiny_data: Path, batch_frames: int) -> None:
    """By a detector that takes its time: 1 ms a frame of 96 x 128 pixels with padding."""

    class Slow:
        def __init__(self) -> None:
            self.batches = list[int]()

        def features(self, images_BCHW: Tensor) -> FrameFeatures:
            self.batches.append(len(images_BCHW))
            time.sleep(1e-3 * len(images_BCHW))
            nothing = torch.zeros(len(images_BCHW), 1, 1, 1)
            return FrameFeatures(frame_queries_BLQC=nothing, mask_features_BCHW=nothing)

    slow, videos = Slow(), load_labels(tiny_data / "valid.json").videos
    jobs = [video_job(video, View(), tiny_data / "valid/JPEGImages", None) for video in videos if video.height == 96]
    pace = seconds_per_pixel(BatchRunner(slow, batch_frames), jobs)  # type: ignore[arg-type]
    assert set(slow.batches) == {batch_frames} and 20 <= sum(slow.batches[1:]) < 20 + batch_frames  # the first warms up
    assert 1e-3 <= pace * 96 * 128 < 1e-2


# Refusal


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB; where this user may not mount one, the test is skipped."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_refused_before_anything_is_written(tiny_data: Path, small_disk: Path) -> None:
    settings = tiny_settings(tiny_data, small_disk / "features", small_disk)
    with pytest.raises(
        CacheError, match=r"42 frames do not fit.*expected 4.82 MB, got 1.05 MB free[\s\S]*ignore_space"
    ):
        extract(settings)
    assert list(small_disk.iterdir()) == []
    settings.cache.ignore_space = True
    with pytest.raises(CacheError, match=r"video '4': writing failed: No space left"):
        extract(settings)
    assert FeatureCache.open(small_disk / "features" / "train").video_names() == ["2"]


def test_a_complete_cache_on_a_read_only_disk_needs_no_extraction(
    tiny_data: Path, tiny_cache: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    shutil.copytree(tiny_cache / "valid", small_disk / "valid")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    extract(tiny_settings(tiny_data, small_disk, small_disk), only=["valid"])
    assert "all 2 videos are in" in capsys.readouterr().out
    with pytest.raises(CacheError, match="disk cannot be written"):
        extract(tiny_settings(tiny_data, small_disk, small_disk), only=["train"])


def test_a_cache_in_one_file_is_not_extracted_again(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_hdf5(FeatureCache.open(tiny_cache / "valid"), tmp_path / "valid.h5")
    settings = tiny_settings(tiny_data, tmp_path, tmp_path)
    extract(settings, only=["valid"])
    assert f"all 2 videos are in {tmp_path}/valid.h5 already" in capsys.readouterr().out
    labels = json.loads((tiny_data / "valid.json").read_bytes())
    settings.data.valid_labels = str(tmp_path / "other.json")
    Path(settings.data.valid_labels).write_text(json.dumps(labels | {"annotations": labels["annotations"][1:]}))
    with pytest.raises(CacheError, match=r"has other labels(.|\n)*cache import .*/valid\.h5 .*/valid`"):
        extract(settings, only=["valid"])
    assert {entry.name for entry in tmp_path.iterdir()} == {"other.json", "valid.h5"}


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """All disks have so many bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total=10**12, used=10**12 - free, free=free))


def test_room_decides_and_ignore_space_overrides(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = feature_bytes(tiny_cache / "valid")
    settings = tiny_settings(tiny_data, tmp_path / "features", tmp_path)
    leave_free(monkeypatch, int(needed * 0.98))
    with pytest.raises(CacheError, match="12 frames do not fit"):
        extract(settings, only=["valid"])
    assert not (tmp_path / "features").exists()
    settings.cache.ignore_space = True
    extract(settings, only=["valid"])
    assert feature_bytes(tmp_path / "features" / "valid") == needed


def test_an_upload_needs_room_for_a_few_videos_only(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sorted(
        sum(file.stat().st_size for file in video.glob("*/c.*")) for video in (tiny_cache / "train/videos").glob("*/")
    )
    with local_s3("room") as bucket:
        settings = tiny_settings(tiny_data, f"{bucket}/features", tmp_path)
        leave_free(monkeypatch, int(sum(sizes[-LOCAL_VIDEOS:]) * 0.98))
        with pytest.raises(CacheError, match=r"30 frames do not fit"):
            extract(settings, only=["train"])
        leave_free(monkeypatch, sum(sizes[-LOCAL_VIDEOS:]))
        extract(settings, only=["train"])
        assert len(FeatureCache.open(f"{bucket}/features/train").video_names()) == 5
        settings.cache.stage_to = str(tmp_path / "ssd")
        with pytest.raises(CacheError, match=r"12 frames do not fit"):
            leave_free(monkeypatch, 1000)
            extract(settings, only=["valid"])
