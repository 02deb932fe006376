"""Options that make a training step cheaper, and the benchmark that measures it, against plain implementations."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from cache.errors import ConfigError
from configs.load import load_settings
from configs.schema import Settings
from tests.conftest import tiny_settings
from train_head import products
from train_head.bench.problem import Problem, in_miniature, write_bench_cache
from train_head.bench.sides import Dense, Ours
from train_head.bench.sustained import sustain
from train_head.build import point_config
from train_head.data.clips import Clip
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.heads import attention
from train_head.heads.contract import HeadConfig
from train_head.heads.layers import MultiheadAttention
from train_head.heads.vita import VitaHead
from train_head.losses.points import RandomPoints, choose_uncertain
from train_head.products import product
from train_head.trainer import Trainer

CPU = torch.device("cpu")


def test_matching_points_and_oversampling_are_settings_of_their_own() -> None:
    loss = load_settings("demo", ["loss.num_points=100", "loss.matching_points=30", "loss.oversample=1.5"]).loss
    source = RandomPoints.for_clip(point_config(loss), 0, 0, CPU)
    assert source.matching_points(CPU).shape == (30, 2)
    points = source.loss_points(1, CPU)
    # 75 of 150 candidates are chosen, and 25 points more.
    assert (points.num_candidates, points.keep, points.points_GS2.shape[1]) == (150, 75, 175)
    index_GP = choose_uncertain(torch.arange(175.0)[None].flip(1), points.num_candidates, points.keep)
    assert sorted(index_GP[0].tolist()) == list(range(75, 175))
    assert point_config(load_settings("demo", ["loss.num_points=100"]).loss).matching == 100


@pytest.mark.parametrize("override", ["loss.matching_points=0", "loss.oversample=0.5", "train.num_layers=4"])
def test_impossible_options_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_settings("demo", [override])


def first_step(
    settings: Settings, *, last_layer_only: bool = False, backend: str | None = None
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a run's first step; with `last_layer_only` from clips that hold no other layer.

    `backend`: of torch.compile, for the head.
    """
    source = CachedSource(settings, open_training_set(settings), CPU)
    trainer = Trainer(settings, source, Path(settings.runs) / settings.name)
    if backend is not None:
        trainer.head.compile(backend=backend)
    clips = next(trainer._batches())
    if last_layer_only:
        clips = [last_layer(clip) for clip in clips]
    loss = float(trainer.compute.gradients(trainer.head, clips)[0])
    return loss, [parameter.grad for parameter in trainer.head.parameters() if parameter.grad is not None]


def last_layer(clip: Clip) -> Clip:
    return replace(clip, frame_queries_TLQC=clip.frame_queries_TLQC[:, -1:])


def test_one_trained_layer_equals_a_cache_of_one_layer(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    loss, gradients = first_step(tiny_settings(tiny_data, tiny_cache, tmp_path, "train.num_layers=1"))
    expected, expected_gradients = first_step(tiny_settings(tiny_data, tiny_cache, tmp_path), last_layer_only=True)
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_the_matching_sees_half_precision_and_losses_stay_near(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "train.precision=bfloat16")
    trainer = Trainer(settings, CachedSource(settings, open_training_set(settings), CPU), tmp_path / "none")
    assert trainer.compute.criterion.matching_type == torch.bfloat16
    expected = first_step(tiny_settings(tiny_data, tiny_cache, tmp_path))[0]
    assert first_step(settings)[0] == pytest.approx(expected, rel=0.03)


def test_a_traced_head_trains_alike(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """What torch.compile traces, run without the compiler, which takes minutes."""
    words = ("head.enc_layers=1", "head.dec_layers=1", "train.num_layers=1", "train.workers=0")
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, *words)
    loss, gradients = first_step(settings, backend="aot_eager")
    expected, expected_gradients = first_step(settings)
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_head_of_real_width_is_one_graph() -> None:
    """Where sizes are worth a CPU's own products and attention, compilation must not meet them."""
    torch.compiler.reset()  # of what other tests have compiled
    head = VitaHead(HeadConfig(num_classes=4, enc_layers=1, dec_layers=1))
    graphs = CompileCounter()
    head.compile(backend=graphs, fullgraph=True)
    head(torch.randn(1, 1, 5, 100, 256)).mask_embed_DLBVC.sum().backward()
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_a_compiled_head_trains_alike(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    loss, gradients = first_step(tiny_settings(tiny_data, tiny_cache, tmp_path, "train.compile=true"))
    expected, expected_gradients = first_step(tiny_settings(tiny_data, tiny_cache, tmp_path))
    assert loss == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_clips", [1, 2])
def test_plain_losses_equal_ours(tmp_path: Path, num_clips: int) -> None:
    problem = in_miniature(Problem(clips=num_clips))
    write_bench_cache(tmp_path, problem)
    for dense, ours in Dense(problem, tmp_path).compare().values():
        assert dense > 0 and ours == pytest.approx(dense, rel=1e-4)


def test_the_parts_of_a_step_are_a_step(tmp_path: Path) -> None:
    """Taking a step in pieces leaves the weights that taking it whole does."""
    problem = in_miniature(Problem())
    write_bench_cache(tmp_path, problem)
    whole, pieces = Ours(problem, tmp_path), Ours(problem, tmp_path)
    whole.step()
    for group in pieces.trainer.optimizer.param_groups:
        group["lr"] = whole.trainer.optimizer.param_groups[0]["lr"]
    pieces.parts()
    for ours, theirs in zip(whole.trainer.head.parameters(), pieces.trainer.head.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_pace_counts_waiting_within_the_step(tmp_path: Path) -> None:
    problem = in_miniature(Problem())
    write_bench_cache(tmp_path, problem)
    side = Ours(problem, tmp_path)

    def slow_batches() -> Iterator[list[Clip]]:
        for clips in side.batches:
            time.sleep(0.05)
            yield clips

    pace = sustain(side.trainer, slow_batches())
    assert 0.05 <= pace.seconds * pace.waiting < pace.seconds
    assert side.trainer.progress.step == 3 and "aten::" in pace.largest


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("num_keys", "mkl_ahead"), [(40, False), (1 << 14, False), (1 << 14, True)])
def test_every_path_of_attention(
    num_keys: int, mkl_ahead: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against softmax(q·kᵀ/√D)·v in float64; bfloat16 keeps 8 bits."""
    monkeypatch.setattr(products, "_MKL_AHEAD", mkl_ahead)
    monkeypatch.setattr(attention, "_FEW_THREADS", 1 << 10)
    monkeypatch.setattr(attention, "_PLAIN", dict.fromkeys((torch.bfloat16, torch.float32), 1 << 20))
    taken: list[Tensor] = []
    monkeypatch.setattr(attention, "product", lambda *operands: (taken.append(operands[0]), product(*operands))[1])
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 24, 64), (1, num_keys, 64), (1, num_keys, 64)
    tokens = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tested = [token.clone().requires_grad_() for token in tokens]
    exact = [token.double().requires_grad_() for token in tokens]
    query, key, value = (token.unflatten(2, (8, 8)).transpose(1, 2) for token in exact)
    expected = (torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ value).transpose(1, 2).flatten(2)
    attended = MultiheadAttention(64, 8).attend(*tested)
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn(expected.shape, generator=generator)
    expected.backward(gradient.double())
    attended.backward(gradient.to(dtype))
    for ours, theirs in zip(tested, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2 * tolerance, atol=tolerance)
    head_by_head = dtype == torch.float32 and num_keys > 40 and not mkl_ahead
    assert bool(taken) == head_by_head


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    """Pages that come anew from the system are counted as minor faults."""
    code = """if True:
        import ctypes, resource, sys
        from cache.allocation import keep_freed_memory
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be few
        if sys.argv[1] != "return":
            keep_freed_memory(however_large=sys.argv[1] == "all")
        def faults(*sizes):
            pieces = [b"x" * (size << 20) for size in sizes]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for sizes in ([4] * 8, [40]):  # MB: 8,192 pages in eight pieces, 10,240 in one
            first = faults(*sizes)
            print(faults(*sizes) - first)
    """
    kept, all_kept, returned = (
        [int(line) for line in subprocess.check_output([sys.executable, "-c", code, word], text=True).split()]
        for word in ("some", "all", "return")
    )
    assert kept[0] < 1000 < min(kept[1], *returned)
    assert max(all_kept) < 1000


@pytest.mark.slow
def test_a_side_that_fails_ends_the_others() -> None:
    """Of two points the cheap options take none: their side refuses after four others have begun to wait.

    In a process of its own: sides write where the one that has forked the first of them wrote.
    """
    code = """if True:
        import gc
        from dataclasses import replace
        from multiprocessing import active_children
        from train_head.bench.problem import Problem, in_miniature
        from train_head.bench.step import compare
        try:
            compare(replace(in_miniature(Problem()), points=2), turns=1)
        except RuntimeError as error:
            print(error)
        gc.collect()  # the pipes' ends, which the others read, go with the traceback
        started = active_children()
        for process in started:
            process.join(60)
        print([process.exitcode for process in started])
    """
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    message, statuses = done.stdout.splitlines()
    assert "'cheap'" in message and set(json.loads(statuses)) <= {1}
    assert "loss.num_points" in done.stderr
