"""The same numbers on CUDA as on CPU, within the tolerances stated here. Skipped where there is no CUDA device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cache.media.geometry import Transform
from cache.reader import FeatureCache
from configs.schema import Precision, Settings
from evaluate.tracks.predictors import head_predictor
from extract.decoding import decode_on
from extract.demo.stills import make_still
from extract.detector.frozen import load_detector
from extract.frames import FrameFile
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.device_steps import Gradients, assert_same_gradients, open_trainer, step_without_waiting
from tests.test_points import assert_uncertain_points
from tests.train_until import before_step, interrupt
from train_head.data.clip_loader import Slots
from train_head.data.clips import Clip
from train_head.data.video_sets import open_evaluation_set
from train_head.joint import finetune
from train_head.losses.logit_visits import fused_visit, visit_logits
from train_head.losses.points import PointConfig, RandomPoints
from train_head.run_folder import read_metrics_log
from train_head.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DETECTOR = Path(__file__).parent.parent / "extract" / "demo" / "detector"
CODECS = ("float16", "int8", "logit", "spectral")


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """By hand: these attributes are computed, and pytest's monkeypatch would delete them in the end."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = before


@pytest.fixture(scope="module", params=CODECS)
def stored(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a cache with each codec, on the CPU."""
    root = tmp_path_factory.mktemp(request.param)
    settings = tiny_settings(tiny_data, root / "cache", root / "runs", f"cache.codec={request.param}")
    extract(settings)
    return settings


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


def test_losses_and_gradients_of_a_step(stored: Settings) -> None:
    assert_same_gradients(*(Gradients.of(open_trainer(stored, device)) for device in ("cpu", "cuda")))


def test_losses_of_a_step_in_bfloat16(stored: Settings) -> None:
    """8 bits of each number in the head alone; a match may fall to another query."""
    expected = Gradients.of(open_trainer(stored, "cpu"))
    got = Gradients.of(open_trainer(stored, "cuda", Precision.bfloat16))
    assert got.terms["loss"] == pytest.approx(expected.terms["loss"], rel=0.1)
    assert all(gradient.isfinite().all() for gradient in got.of_parameters.values())


def test_the_host_waits_for_the_matching_alone(stored: Settings) -> None:
    """Whatever else would make it wait raises here; the matching's costs come by an event, which does not."""
    terms = step_without_waiting(open_trainer(stored, "cuda", Precision.bfloat16))
    assert terms.is_cuda and terms.isfinite().all()


@pytest.mark.parametrize("logit_type", [torch.float32, torch.bfloat16])
def test_the_visit_of_the_logits_is_compiled(logit_type: torch.dtype) -> None:
    logits = (8 * torch.randn(3, 20, 501, generator=torch.Generator().manual_seed(0))).to("cuda", logit_type)
    with torch.no_grad():
        visit = fused_visit("cuda", logit_type)
        assert visit is not visit_logits
        for ours, expected in zip(visit(logits), visit_logits(logits), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_uncertain_points() -> None:
    assert_uncertain_points(torch.device("cuda"))


def test_random_points_depend_on_seed_and_clip_only() -> None:
    config, device = PointConfig(matching=9, loss=8), torch.device("cuda", 0)
    first, again, other = (RandomPoints.for_clip(config, 3, clip, device) for clip in (7, 7, 8))
    drawn = first.matching_points(device)
    assert drawn.device == device and torch.equal(drawn, again.matching_points(device))
    assert torch.equal(*(source.loss_points(2, device).points_GS2 for source in (first, again)))
    assert not torch.equal(drawn, other.matching_points(device))


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_are_those_on_the_disk_while_steps_are_still_queued(stored: Settings, workers: int) -> None:
    """Every batch is read by the device long after it was let go here, and after its slots were filled anew."""
    settings = deepcopy(stored)
    settings.train.workers, settings.train.iterations = workers, 30
    trainer = open_trainer(settings, "cuda")
    matrix = torch.rand(4000, 4000, device="cuda")
    queued = []
    for batch in trainer._batches():
        for _ in range(3):
            matrix = matrix @ matrix / matrix.norm()
        queued += [(clip.index, [tensor.clone() for tensor in tensors_of(clip)]) for clip in batch]
    dataset = trainer.source.clips()
    assert [index for index, _ in queued] == list(range(30 * settings.train.batch_clips))
    for index, tensors in queued:
        expected = tensors_of(dataset.read(index, np.empty))
        assert all(torch.equal(got.cpu(), wanted) for got, wanted in zip(tensors, expected, strict=True))


def tensors_of(clip: Clip) -> list[Tensor]:
    targets = clip.targets
    labels = targets.labels_N, targets.identities_N, targets.present_NT, targets.masks_NThw
    return [clip.frame_queries_TLQC, clip.map_TRHW, *labels]


def test_after_a_refused_page_lock_the_device_works(capsys: pytest.CaptureFixture[str]) -> None:
    slots = Slots(1, 2, 1 << 16)
    slots.pin()
    assert capsys.readouterr().out == ""
    slots.pin()  # a second time: refused
    assert "does not page-lock" in capsys.readouterr().out
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_whole_video_tracks(tiny_data: Path, tiny_cache: Path, tiny_run: Settings) -> None:
    videos = open_evaluation_set(tiny_run)
    cached = videos.feature_cache.video(str(videos.video_ids[0]))
    tracks = {}
    for device in ("cpu", "cuda"):
        settings = tiny_settings(tiny_data, tiny_cache, Path(tiny_run.runs), f"device={device}", "name=tiny")
        tracks[device] = head_predictor(settings, videos)(cached)
    assert tracks["cuda"].scores == pytest.approx(tracks["cpu"].scores, abs=1e-3)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """Up to the order of sums, which differs from run to run on CUDA: it may tip which points are uncertain."""

    def settings(name: str) -> Settings:
        words = ("device=cuda", "train.precision=float32", "train.workers=1", f"name={name}")
        return tiny_settings(tiny_data, tiny_cache, tmp_path, *words)

    train(settings("whole"))
    with pytest.raises(KeyboardInterrupt), before_step(4, interrupt):  # after the checkpoint of step 3
        train(settings("broken"))
    train(settings("broken"))
    whole, broken = (read_metrics_log(tmp_path / name) for name in ("whole", "broken"))
    assert [entry["step"] for entry in broken] == [1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in broken] == pytest.approx([entry["loss"] for entry in whole], rel=0.02)


@pytest.mark.parametrize("run", [train, finetune])
def test_a_run_of_the_default_precision(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, run: Callable[[Settings], Path]
) -> None:
    words = ("device=cuda", "train.workers=null", "train.iterations=3", "train.num_frames=2")
    folder = run(tiny_settings(tiny_data, tiny_cache, tmp_path, *words))
    assert all(np.isfinite(entry["loss"]) for entry in read_metrics_log(folder))
    assert (folder / "checkpoint.pt").exists()


def test_the_benchmark_runs() -> None:
    """Its status says whether plain losses and ours agree to 1e-4."""
    command = [sys.executable, "-m", "train_head", "bench", "--device", "cuda", "--small"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "waits for data" in ended.stdout
