"""The same numbers on CUDA as on CPU, within the tolerances stated here. Skipped where there is no CUDA device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.media.geometry import Transform
from cache.reader import FeatureCache
from configs.schema import Device, Precision, Settings
from evaluate.tracks.predictors import head_predictor
from extract.decoding import decode_on
from extract.demo.stills import make_still
from extract.detector.frozen import load_detector
from extract.frames import FrameFile
from extract.stage import extract
from tests.conftest import tiny_settings
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_evaluation_set, open_training_set
from train_head.run_folder import open_run
from train_head.trainer import Trainer, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DETECTOR = Path(__file__).parent.parent / "extract" / "demo" / "detector"


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.5)])
def test_detector_features(precision: str, tolerance: float) -> None:
    images = torch.from_numpy(np.stack([make_still(seed, (90, 160)).image for seed in range(4)])).permute(0, 3, 1, 2)
    expected = load_detector(DETECTOR).features(images)
    got = load_detector(DETECTOR, precision=precision, device="cuda").features(images)
    for name in ("frame_queries_BLQC", "mask_features_BCHW"):
        ours, reference = getattr(got, name).float().cpu(), getattr(expected, name)
        assert float((ours - reference).abs().mean() / reference.abs().mean()) < tolerance


def test_nvjpeg_sees_what_pillow_sees(tmp_path: Path) -> None:
    """nvJPEG rounds, and spreads chroma, in ways of its own."""
    for seed in range(4):
        Image.fromarray(make_still(seed, (180, 320)).image).save(tmp_path / f"{seed}.jpg", quality=92)
        transform = Transform(crop=(10, 20, 160, 280), size=(80, 140), flip=True)
        file = FrameFile(group="", path=tmp_path / f"{seed}.jpg", original_hw=(180, 320), transform=transform)
        got = decode_on(file, "cuda")
        difference = (got.cpu().int() - file.load().int()).abs().float()
        assert got.is_cuda and 0 < difference.mean() < 1 and difference.max() < 40


def test_extraction_copies_what_it_has_computed(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    extract(tiny_settings(tiny_data, tmp_path, tmp_path, "device=cuda", "detector.precision=float32"), only=["train"])
    got, expected = (FeatureCache.open(root / "train") for root in (tmp_path, tiny_cache))
    for name in expected.video_names():
        ours, reference = (each.video(name).mask_features().astype(np.float32) for each in (got, expected))
        assert np.abs(ours - reference).mean() < 1e-3 * np.abs(reference).mean()


def test_extraction_with_nvjpeg(tiny_data: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_data, tmp_path, tmp_path, "device=cuda", "detector.decoder=torchvision")
    extract(settings)
    assert len(FeatureCache.open(tmp_path / "train").video_names()) == 5


def on_device(settings: Settings, device: Device, precision: Precision, name: str) -> Trainer:
    settings.device, settings.train.precision, settings.name = device, precision, name
    videos = open_training_set(settings)
    folder = open_run(settings, None)
    return Trainer(settings, CachedSource(settings, videos, torch.device(device.value)), folder)


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.float32, 2e-3), (Precision.bfloat16, 0.1)])
def test_the_loss_of_a_step(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, precision: Precision, tolerance: float
) -> None:
    """Points come from a generator on the device, so losses agree only up to the sampling: many points are drawn."""
    many = "loss.num_points=20000"
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, many)
    reference = on_device(settings, Device.cpu, Precision.float32, "cpu")
    clips = next(reference._batches())
    expected = reference.training_step(clips).loss
    trainer = on_device(tiny_settings(tiny_data, tiny_cache, tmp_path, many), Device.cuda, precision, "cuda")
    assert trainer.training_step(clips).loss == pytest.approx(expected, rel=tolerance + 0.03)


def test_whole_video_tracks(tiny_data: Path, tiny_cache: Path, tiny_run: Settings) -> None:
    videos = open_evaluation_set(tiny_run)
    cached = videos.feature_cache.video(str(videos.video_ids[0]))
    tracks = {}
    for device in (Device.cpu, Device.cuda):
        settings = tiny_settings(tiny_data, tiny_cache, Path(tiny_run.runs), f"device={device.value}", "name=tiny")
        tracks[device] = head_predictor(settings, videos)(cached)
    assert tracks[Device.cuda].scores == pytest.approx(tracks[Device.cpu].scores, abs=1e-3)


def test_a_run_trains_with_pinned_batches_and_workers(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, "device=cuda", "train.workers=1", "name=cuda"))
    assert (tmp_path / "cuda" / "checkpoint.pt").exists()
