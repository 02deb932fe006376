"""What CUDA devices run, on a device that only says it is one (claimed_cuda.py): every tensor lies where it has to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.reader import FeatureCache
from configs.schema import Settings
from evaluate.stage import evaluate
from extract.stage import extract
from tests.claimed_cuda import claim_cuda, is_claimed
from tests.conftest import tiny_settings
from tests.device_steps import Gradients, assert_same_gradients, open_trainer, step_without_waiting
from tests.train_until import before_step, interrupt
from train_head.bench.problem import Problem, in_miniature, write_bench_cache
from train_head.bench.sides import Dense, SideName, build
from train_head.joint import finetune
from train_head.run_folder import read_metrics_log
from train_head.trainer import train

ON_CUDA = ("device=cuda", "train.precision=float32", "train.workers=0")


@pytest.fixture(autouse=True)
def _claimed_cuda(monkeypatch: pytest.MonkeyPatch, tiny_run: Settings) -> Iterator[None]:
    with claim_cuda(monkeypatch):
        yield


@pytest.fixture(scope="module", params=["float16", "spectral"])
def stored(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a cache by the CPU."""
    root = tmp_path_factory.mktemp(request.param)
    words = (f"cache.codec={request.param}", "cache.calibration_frames=12", "train.workers=0")
    settings = tiny_settings(tiny_data, root / "cache", root / "runs", *words)
    extract(settings, only=["train"])
    return settings


def test_the_device_minds_where_tensors_lie() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.is_cuda and there.device == torch.device("cuda", 0) and (2 * there).is_cuda and not here.is_cuda
    assert not there.cpu().is_cuda and here.to("cuda").is_cuda and torch.nn.Linear(3, 3).to("cuda")(there).is_cuda
    with pytest.raises(RuntimeError, match="add: expected all tensors to be on the same device"):
        here + there
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (there.tolist, there.cpu, lambda: bool(there[0]), lambda: there[torch.tensor([0])]):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step(stored: Settings) -> None:
    assert_same_gradients(*(Gradients.of(open_trainer(stored, device)) for device in ("cpu", "cuda")))
    trainer = open_trainer(stored, "cuda")
    assert all(is_claimed(clip.map_TRHW) for clip in next(trainer._batches()))
    assert all(is_claimed(parameter) for parameter in trainer.head.parameters())


def test_the_host_waits_for_the_matching_alone(stored: Settings) -> None:
    """Whatever else would make it wait raises, as the test of the device shows."""
    terms = step_without_waiting(open_trainer(stored, "cuda"))
    assert is_claimed(terms) and terms.isfinite().all()


def test_a_batch_without_objects(stored: Settings) -> None:
    trainer = open_trainer(stored, "cuda")
    (clip, *_) = next(trainer._batches())
    targets = clip.targets
    nothing = replace(
        targets,
        labels_N=targets.labels_N[:0],
        identities_N=targets.identities_N[:0],
        present_NT=targets.present_NT[:0],
        masks_NThw=targets.masks_NThw[:0],
    )
    losses = trainer.training_step([replace(clip, targets=nothing)] * stored.train.batch_clips)
    assert losses.mask == losses.similarity == 0 and losses.class_loss > 0


def test_an_interrupted_run_goes_on(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, *ON_CUDA, "train.ema=0.9")
    with pytest.raises(KeyboardInterrupt), before_step(4, interrupt):
        train(settings)
    train(settings)
    assert [entry["step"] for entry in read_metrics_log(tmp_path / settings.name)] == [1, 2, 3, 4, 5, 6]


def test_fine_tuning(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    words = (*ON_CUDA, "train.iterations=2", "train.num_frames=2")
    logs = []
    for device in ("cpu", "cuda"):
        settings = tiny_settings(tiny_data, tiny_cache, tmp_path, *words, f"device={device}", f"name={device}")
        logs.append(read_metrics_log(finetune(settings)))
    expected, got = ([entry["loss"] for entry in log] for log in logs)
    assert len(got) == 2 and got == pytest.approx(expected, rel=1e-3)


def test_evaluation(tiny_data: Path, tiny_cache: Path, tiny_run: Settings) -> None:
    expected = evaluate(tiny_run)
    settings = tiny_settings(tiny_data, tiny_cache, Path(tiny_run.runs), *ON_CUDA[:1], "name=tiny")
    assert evaluate(settings).metrics == expected.metrics


def test_extraction(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    extract(tiny_settings(tiny_data, tmp_path, tmp_path, *ON_CUDA, "detector.precision=float32"), only=["train"])
    got, expected = (FeatureCache.open(root / "train") for root in (tmp_path, tiny_cache))
    for name in expected.video_names():
        ours, reference = (each.video(name).mask_features().astype(np.float32) for each in (got, expected))
        assert np.abs(ours - reference).mean() < 1e-3 * np.abs(reference).mean()


@pytest.mark.parametrize("name", [SideName.live, SideName.dense, SideName.ours, SideName.cheap])
def test_the_sides_of_the_benchmark(tmp_path: Path, name: SideName, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Problem.settings
    monkeypatch.setattr(Problem, "settings", lambda *each: settings(*each[:2], [*each[2], *ON_CUDA[1:]]))
    problem = in_miniature(Problem(device="cuda", clips=2, frames=3))
    write_bench_cache(tmp_path, problem)
    side = build(name, problem, tmp_path)
    if isinstance(side, Dense):
        for dense, ours in side.compare().values():
            assert ours == pytest.approx(dense, rel=1e-4)
    side.step()
    assert sum(side.parts().values()) > 0 and side.flops() > 0
