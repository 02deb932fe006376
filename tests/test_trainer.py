"""What keeps a training run honest: schedule, decay groups, averages, the best checkpoint, several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import SwinConfig, SwinModel

from cache.errors import ConfigError, FolderBusy, IncompleteVideo, VitaCacheError
from cache.reader import FeatureCache
from cache.storage.locks import ROOT_LOCK, Owner
from configs.schema import Settings
from evaluate.stage import evaluate, score_head
from tests.conftest import tiny_settings
from tests.train_until import before_step, interrupt
from train_head import trainer
from train_head.build import TrainedPart, build_optimizer, feature_sizes, learning_rate
from train_head.checkpoint import BEST, CHECKPOINT, load_checkpoint, save_checkpoint
from train_head.data.clips import Clip
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.distributed import Group, share_of_batches
from train_head.heads.vita import VitaHead
from train_head.run_folder import METRICS_LOG, MetricsLog, open_run, read_metrics_log
from train_head.trainer import Trainer, train


def test_learning_rate_warms_up_then_steps_down(tiny_run: Settings) -> None:
    rate = tiny_run.train.learning_rate  # warmup 2, decay at 4
    assert [learning_rate(tiny_run, step) / rate for step in range(6)] == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1])


def test_norms_and_embeddings_are_not_decayed(tiny_run: Settings) -> None:
    head = VitaHead(load_checkpoint(Path(tiny_run.runs) / "tiny" / CHECKPOINT).config)
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    decayed, free = build_optimizer([TrainedPart(module=head)], tiny_run).param_groups
    assert decayed["weight_decay"] == tiny_run.train.weight_decay and free["weight_decay"] == 0
    free_names = {names[id(parameter)] for parameter in free["params"]}
    embeddings = ("query_feat.weight", "query_embed.weight", "fq_pos.weight")
    assert free_names == {name for name in names.values() if "norm" in name or name in embeddings}
    assert len(free["params"]) + len(decayed["params"]) == len(names)


def test_positional_biases_of_swin_are_not_decayed(tiny_run: Settings) -> None:
    backbone = SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], use_absolute_embeddings=True))
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    decayed, free = build_optimizer([TrainedPart(module=backbone)], tiny_run).param_groups
    free_names = {names[id(parameter)] for parameter in free["params"]}
    assert sum("relative_position_bias_table" in name for name in free_names) == 2
    assert "embeddings.position_embeddings" in free_names
    assert all("norm" in name or "position" in name for name in free_names)
    assert len(free["params"]) + len(decayed["params"]) == len(names)


def test_a_cache_without_its_first_video_says_so(tiny_cache: Path) -> None:
    feature_cache = FeatureCache.open(tiny_cache / "train")
    labels = feature_cache.labels()
    missing = replace(labels, videos=tuple(replace(video, id=video.id + 90) for video in labels.videos))
    for broken in (missing, replace(labels, videos=())):
        with pytest.raises(IncompleteVideo):
            feature_sizes(feature_cache, broken)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_each_batch_without_gaps_or_duplicates(size: int) -> None:
    shares = [list(share_of_batches(range(3, 6), 4, Group(rank=rank, size=size))) for rank in range(size)]
    own = 4 // size
    batches = [[clip for share in shares for clip in share[i * own : (i + 1) * own]] for i in range(3)]
    assert batches == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]


def final_weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(runs / name / CHECKPOINT).head)


def assert_same_training(runs: Path, one: str, other: str) -> None:
    """Equal up to the order of floating point sums: the losses of every step, and the final weights."""
    first, second = (read_metrics_log(runs / name) for name in (one, other))
    for key in ("loss", "class", "mask", "dice", "similarity"):
        assert [e[key] for e in first] == pytest.approx([e[key] for e in second], rel=1e-4)
    expected, got = final_weights(runs, one), final_weights(runs, other)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-2, atol=2e-4)


def test_accumulated_micro_batches_train_like_one_batch(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    for name, accumulate in (("whole", 1), ("parts", 2)):
        words = (f"name={name}", f"train.accumulate={accumulate}", "train.batch_clips=4", "train.iterations=4")
        train(tiny_settings(tiny_data, tiny_cache, tmp_path, *words))
    assert_same_training(tmp_path, "whole", "parts")
    with pytest.raises(ConfigError, match=r"batch_clips(.|\n)*multiple"):
        train(tiny_settings(tiny_data, tiny_cache, tmp_path, "train.accumulate=3", "name=odd"))


def test_two_trainers_of_one_run_are_refused(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=shared", "train.workers=0")
    refused = []

    def second_trainer() -> None:
        with pytest.raises(
            FolderBusy, match=rf"shared: another process works here: process {os.getpid()} on "
        ) as error:
            train(settings)
        refused.append(error)

    with before_step(1, second_trainer):
        train(settings)
    assert len(refused) == 1 and load_checkpoint(tmp_path / "shared" / CHECKPOINT).step == 6
    assert not list((tmp_path / "shared").glob(".*"))


def test_what_a_killed_trainer_leaves_is_in_nobody_s_way(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """On another machine, in the middle of writing a checkpoint."""
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=killed", "train.workers=0", "train.iterations=1")
    run = tmp_path / "killed"
    run.mkdir()
    (run / ".checkpoint.pt.4321.tmp").write_bytes(b"half")
    owner = Owner(host="node17", pid=4321, since="2026-11-22T10:00:00+00:00", run="")
    (run / ROOT_LOCK).write_text(json.dumps(asdict(owner)))
    train(settings)
    assert load_checkpoint(run / CHECKPOINT).step == 1 and not list(run.glob(".*"))


def test_a_log_cut_off_by_a_kill_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / METRICS_LOG).write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert [entry["step"] for entry in read_metrics_log(tmp_path)] == [1, 2]
    log = MetricsLog(tmp_path, 1)
    log.write(2, {"loss": 0.3})
    log.close()
    assert (tmp_path / METRICS_LOG).read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.3}\n'


def test_a_moving_average_of_the_weights_is_kept_and_evaluated(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=ema", "train.ema=0.5", "train.iterations=3")
    seen: list[dict[str, torch.Tensor]] = []
    original = Trainer.training_step

    def watched(self: Trainer[Clip], clips: list[Clip]) -> object:
        if not seen:
            seen.append({key: value.clone() for key, value in self.head.state_dict().items()})
        result = original(self, clips)
        seen.append({key: value.clone() for key, value in self.head.state_dict().items()})
        return result

    monkeypatch.setattr(Trainer, "training_step", watched)
    train(settings)
    checkpoint = load_checkpoint(tmp_path / "ema" / CHECKPOINT)
    built = checkpoint.build_head("cpu").state_dict()
    for key in checkpoint.head:
        expected = seen[0][key] / 8 + seen[1][key] / 8 + seen[2][key] / 4 + seen[3][key] / 2
        torch.testing.assert_close(checkpoint.average[key], expected)
        assert torch.equal(built[key], checkpoint.average[key])


def test_early_evaluation_logs_ap_and_keeps_the_best(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=early", "train.evaluate_every=2")
    scores = iter([0.2, 0.5, 0.1])
    train(settings, lambda: next(scores))
    run = tmp_path / "early"
    assert [(e["step"], e["AP"]) for e in read_metrics_log(run) if "AP" in e] == [(2, 0.2), (4, 0.5), (6, 0.1)]
    best = load_checkpoint(run / BEST)
    assert best.step == 4
    assert load_checkpoint(run / CHECKPOINT).best_ap == 0.5
    real = score_head(settings)
    written = evaluate(settings).metrics["head"]
    assert written is not None and real == written.AP
    evaluate(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=early", "evaluate.checkpoint=best"))
    assert json.loads((run / "metrics.json").read_text())["num_videos"] == 2


def test_a_worse_head_never_replaces_the_best_of_before_a_kill(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=killed", "train.evaluate_every=2")
    scores = iter([0.5, 0.2, 0.1])
    with pytest.raises(KeyboardInterrupt), before_step(3, interrupt):
        train(settings, lambda: next(scores))
    train(settings, lambda: next(scores))
    best = load_checkpoint(tmp_path / "killed" / BEST)
    assert (best.step, best.best_ap) == (2, 0.5)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_an_evaluation_is_made_up_for_wherever_it_was_killed(
    stride: int, tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first checkpoint, evaluation or line of the log, a later one, ... up to a run that is not."""
    words = ("train.iterations=3", "train.evaluate_every=1", "train.workers=0", "loss.num_points=16")
    scores = {1: 0.2, 2: 0.5, 3: 0.1}
    events, fatal, survived = 0, 1 - stride, False

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal events
            result = function(*arguments)
            events += 1
            if events == fatal:
                raise KeyboardInterrupt
            return result

        return wrapped

    monkeypatch.setattr(trainer, "save_checkpoint", dying(save_checkpoint))
    monkeypatch.setattr(MetricsLog, "write", dying(MetricsLog.write))
    while not survived:
        run, events, fatal = tmp_path / f"{fatal}", 0, fatal + stride
        settings = tiny_settings(tiny_data, tiny_cache, tmp_path, f"name={run.name}", *words)
        evaluator = dying(lambda run=run: scores[load_checkpoint(run / CHECKPOINT).step])
        try:
            train(settings, evaluator)
            survived = True
        except KeyboardInterrupt:
            train(settings, evaluator)
        losses_and_scores = [(e["step"], e.get("AP"), e.get("loss")) for e in read_metrics_log(run)]
        assert [entry[:2] for entry in losses_and_scores if entry[1]] == list(scores.items())
        best, last = load_checkpoint(run / BEST), load_checkpoint(run / CHECKPOINT)
        assert (best.best_ap, last.best_ap, scores[best.step], last.evaluated) == (0.5, 0.5, 0.5, 3)
        if fatal == 1:
            expected, weights = losses_and_scores, last.head
        assert losses_and_scores == expected and all(torch.equal(weights[key], last.head[key]) for key in weights)
    assert fatal > 12


def test_a_time_budget_stops_with_a_checkpoint_and_can_be_raised(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=short", "train.time_budget=1e-3"))
    assert load_checkpoint(tmp_path / "short" / CHECKPOINT).step < 6
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=short"))
    train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=long"))
    expected, got = final_weights(tmp_path, "long"), final_weights(tmp_path, "short")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_gradients_that_are_not_finite_change_nothing(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """The loss is finite; the message names the step's own videos."""
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=broken", "train.workers=0")
    source = CachedSource(settings, open_training_set(settings), torch.device("cpu"))
    trainer = Trainer(settings, source, open_run(settings, source.holdout))
    batches = trainer._batches()
    trainer.training_step(next(batches))
    trainer.save()
    before = {name: tensor.clone() for name, tensor in trainer.head.state_dict().items()}
    clips = next(batches)
    weight = next(trainer.head.parameters())
    weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    with pytest.raises(VitaCacheError, match=f"step 1: .*gradients are not; the batch was {clips[0].name} frames"):
        trainer.training_step(clips)
    assert trainer.progress.step == load_checkpoint(tmp_path / "broken" / CHECKPOINT).step == 1
    for state in (trainer.head.state_dict(), load_checkpoint(tmp_path / "broken" / CHECKPOINT).head):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def agreement(rank: int, numbers: tuple[int, ...], meeting: Path) -> bool:
    """What process `rank` is told of the numbers of all."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(numbers))
    return Group(rank=rank, size=len(numbers)).agrees(numbers[rank], torch.device("cpu"))


@pytest.mark.parametrize(("numbers", "expected"), [((4, 4, 4), True), ((3, 4, 5), False)])
def test_all_processes_hear_where_one_is_at_another_step(
    numbers: tuple[int, ...], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with ProcessPoolExecutor(len(numbers), mp_context=multiprocessing.get_context("fork")) as processes:
        answers = [processes.submit(agreement, rank, numbers, tmp_path / "meeting") for rank in range(len(numbers))]
        assert [answer.result() for answer in answers] == [expected] * len(numbers)
