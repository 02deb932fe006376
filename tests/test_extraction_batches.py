"""Batches shared by videos: every frame gets its own features, and the same bits whatever else is in the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.codecs.float16 import Float16
from cache.errors import FrameError, VideoBusy
from cache.labels.tracks import Video
from cache.layout import Size, View
from cache.media.geometry import Transform
from cache.reader import FeatureCache
from cache.writer import CacheWriter
from configs.schema import Settings
from extract.batches import BatchRunner
from extract.detector import engines
from extract.detector.engines import open_detector
from extract.detector.frozen import FrameDetector, FrameFeatures, TransformersDetector
from extract.fingerprint import fingerprint
from extract.frames import load_frame
from extract.jobs import video_job
from extract.streaming import extract_readable_videos, extract_videos
from extract.workers.pool import Equipment, VideoWorker
from tests.cache_samples import open_writer, write_video
from tests.conftest import tiny_settings


@pytest.fixture(scope="module")
def settings(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("batches")
    return tiny_settings(tiny_data, folder, folder, "detector.batch_frames=4")


@pytest.fixture(scope="module")
def detector(settings: Settings) -> FrameDetector:
    return open_detector(settings.detector, precision="float32", device="cpu")


def labelled_videos(data: Path) -> list[Video]:
    found = json.loads((data / "train.json").read_text())["videos"][:3]
    return [
        Video(id=v["id"], width=v["width"], height=v["height"], length=v["length"], file_names=tuple(v["file_names"]))
        for v in found
    ]


def extracted(settings: Settings, detector: FrameDetector, videos: list[Video], path: Path) -> FeatureCache:
    writer = CacheWriter.open(
        path,
        fingerprint=fingerprint(settings, detector, "", Float16()),
        heads=detector.prediction_heads(),
        codec=Float16(),
        labels_json=None,
    )
    frames = Path(settings.data.root) / "train" / "JPEGImages"
    jobs = [video_job(video, View(), frames, settings.detector.short_edge) for video in videos]
    extract_videos(BatchRunner(detector, 4), writer, jobs, lambda count: None)
    return FeatureCache.open(path)


def test_features_are_those_of_single_frames(settings: Settings, detector: FrameDetector, tmp_path: Path) -> None:
    videos = labelled_videos(Path(settings.data.root))
    feature_cache = extracted(settings, detector, videos, tmp_path / "a")
    for video in videos:
        stored = feature_cache.video(str(video.id)).read_clip(range(video.length))
        for frame, name in enumerate(video.file_names):
            hw = (video.height, video.width)
            path = Path(settings.data.root) / "train" / "JPEGImages" / name
            image = load_frame(path, hw, Transform.resize(hw, hw))
            alone = detector.features(image[None])
            height, width = stored.mask_features.shape[2:]
            np.testing.assert_allclose(stored.frame_queries[frame], alone.frame_queries_BLQC[0], rtol=1e-3, atol=1e-3)
            expected = alone.mask_features_BCHW[0, :, :height, :width]
            np.testing.assert_allclose(stored.mask_features[frame], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("device", "asked", "threads", "image_hw", "expected"),
    [
        ("cpu", None, 1, (96, 160), 8),
        ("cpu", None, 1, (360, 640), 2),
        ("cpu", None, 2, (360, 640), 2),
        ("cpu", None, 4, (360, 640), 4),
        ("cpu", None, 1, (480, 640), 1),
        ("cpu", None, 2, (1080, 1920), 1),
        ("cpu", None, 16, (360, 640), 8),
        ("cpu", 6, 1, (360, 640), 6),
        ("cuda", None, 1, (1080, 1920), 8),
        ("cuda", 3, 1, (96, 160), 3),
    ],
)
def test_large_frames_go_through_a_cpu_in_smaller_batches(
    device: str, asked: int | None, threads: int, image_hw: Size, expected: int
) -> None:
    class Counting:
        def __init__(self) -> None:
            self.device, self.seen = torch.device(device), list[int]()

        def features(self, images_BCHW: Tensor) -> FrameFeatures:
            self.seen.append(len(images_BCHW))
            images = images_BCHW[..., :1, :1]
            return FrameFeatures(frame_queries_BLQC=images, mask_features_BCHW=images)

    counting, before = Counting(), torch.get_num_threads()
    images = torch.arange(9)[:, None, None, None].expand(-1, 3, *image_hw)
    try:
        torch.set_num_threads(threads)
        runner = BatchRunner(counting, asked)  # type: ignore[arg-type]
        assert runner.batch_frames(image_hw) == expected
        features = runner.features(images)
    finally:
        torch.set_num_threads(before)
    assert set(counting.seen) == {expected} and len(counting.seen) == -(-9 // expected)
    assert features.frame_queries_BLQC[:, 0, 0, 0].tolist() == list(range(9)), "and none twice"


@pytest.mark.parametrize(("device", "expected"), [("cpu", [True]), ("cuda", [])])
def test_a_detector_on_a_cpu_keeps_freed_memory(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[bool]
) -> None:
    """What that does: tests/test_step_options.py."""
    calls = list[bool]()
    monkeypatch.setattr(engines, "keep_freed_memory", lambda however_large: calls.append(however_large))
    monkeypatch.setattr(TransformersDetector, "__init__", lambda *words, **named: None)
    open_detector(settings.detector, precision="float32", device=device)
    assert calls == expected


def test_a_video_has_the_same_bits_alone_and_among_others(
    settings: Settings, detector: FrameDetector, tmp_path: Path
) -> None:
    videos = labelled_videos(Path(settings.data.root))
    together = extracted(settings, detector, videos, tmp_path / "together")
    for video in videos:
        alone = extracted(settings, detector, [video], tmp_path / str(video.id)).video(str(video.id))
        among = together.video(str(video.id))
        np.testing.assert_array_equal(among.frame_queries(), alone.frame_queries())
        np.testing.assert_array_equal(among.mask_features(), alone.mask_features())


def test_an_unreadable_frame_leaves_the_videos_before_it(
    settings: Settings, detector: FrameDetector, tmp_path: Path
) -> None:
    first = labelled_videos(Path(settings.data.root))[0]
    broken = replace(first, id=99, file_names=("nowhere.jpg", *first.file_names[1:]))
    with pytest.raises(FrameError, match=r"nowhere\.jpg"):
        extracted(settings, detector, [first, broken], tmp_path / "a")
    assert FeatureCache.open(tmp_path / "a").video_names() == [str(first.id)]


def test_numpy_products_behind_the_detector_get_no_threads_of_their_own() -> None:
    """OpenBLAS starts its threads when NumPy is loaded; they would take the cores from the detector."""
    kept = "import extract, os; print(os.environ['OPENBLAS_NUM_THREADS'])"
    count = "import extract, numpy, os; print(len(os.listdir('/proc/self/task')))"
    bare = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    assert printed(count, bare) == "1"
    assert printed(kept, bare | {"OPENBLAS_NUM_THREADS": "3"}) == "3", "what a user sets stays"


def printed(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("by_worker", [False, True])
def test_a_video_that_another_takes_up_after_it_could_not_be_read_here(
    settings: Settings, detector: FrameDetector, tmp_path: Path, by_worker: bool, is_done: bool
) -> None:
    """The other comes between the error, where the lock is given back, and the clean-up."""
    runner = BatchRunner(detector, 4)
    writer, other = open_writer(tmp_path / "a"), open_writer(tmp_path / "a")
    job = video_job(labelled_videos(Path(settings.data.root))[0], View(), tmp_path / "nowhere", None)
    discard = writer.discard

    def discard_late(name: str) -> None:
        if is_done:
            write_video(other, name, 3)
        else:
            assert other.claim(name)
        discard(name)

    writer.discard = discard_late  # type: ignore[method-assign]
    if by_worker:
        worker = VideoWorker(settings, Equipment(device="cpu", precision="float32", threads=1))
        worker._runner, worker._writer = runner, writer
        found = worker.extract(job)
        assert found is None if is_done else isinstance(found, VideoBusy)
    else:
        outcome = extract_readable_videos(runner, writer, [job], lambda count: None)
        assert outcome.skipped == {} and list(outcome.busy) == ([] if is_done else [job.name])
    assert writer.pending([job.name]) == ([] if is_done else [job.name])
