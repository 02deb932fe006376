"""The losses of all clips at once, as on a GPU, against those clip by clip; and how many operations they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import PaddedArea
from tests.conftest import tiny_settings
from tests.operations import Operations
from tests.test_head_parity import golden_head
from train_head.build import trained_parameters
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.heads.contract import HeadOutputs
from train_head.heads.mask_folding import MapDecoding, MaskWeights
from train_head.joint import LiveSource
from train_head.losses import batch_losses, clip_losses, logit_visits
from train_head.losses.criterion import LossNormalisers, VitaCriterion, VitaLosses
from train_head.losses.logit_visits import fused_visit, visit_logits
from train_head.losses.points import PointConfig, PointSource, RandomPoints
from train_head.losses.targets import ClipTargets, clip_targets
from train_head.trainer import Trainer

CPU = torch.device("cpu")

SIZES = [((24, 32), 2), ((21, 30), 0), ((17, 40), 18), ((48, 20), 1)]  # image, objects: none, more than 15 queries
OPTIONS: list[dict[str, Any]] = [
    {},
    {"absent_frames": False},
    {"padded_area": PaddedArea.background},
    {"matching_type": torch.bfloat16},
]


@dataclass(frozen=True)
class Step:
    """What the losses of some clips need, with everything that takes gradients as a leaf."""

    outputs: HeadOutputs
    mask_weights: MaskWeights
    maps: list[Tensor]
    targets: list[ClipTargets]

    @property
    def leaves(self) -> list[Tensor]:
        outputs, weights = self.outputs, self.mask_weights
        assert outputs.clip_similarity_LBVC is not None and outputs.frame_similarity_LBTQC is not None
        similar = outputs.clip_similarity_LBVC, outputs.frame_similarity_LBTQC
        return [outputs.class_logits_DLBVK, weights.weights_R, weights.const, *similar, *self.maps]

    def losses(self, criterion: VitaCriterion, points: Sequence[PointSource]) -> tuple[VitaLosses, list[Tensor]]:
        normalisers = LossNormalisers.of_batch(self.targets, 3, 15)
        losses = criterion(self.outputs, self.mask_weights, self.maps, self.targets, points, normalisers)
        taken = [leaf for leaf in self.leaves if leaf.requires_grad]
        return losses, list(torch.autograd.grad(losses.total, taken))


def clip_of(generator: torch.Generator, num_objects: int, num_frames: int, hw: tuple[int, int]) -> ClipTargets:
    masks_NThw = torch.rand(num_objects, num_frames, *hw, generator=generator) > 0.4
    masks_NThw[: num_objects // 2, : num_frames - 1] = False  # some objects come late
    labels_N = torch.randint(0, 5, (num_objects,), generator=generator)
    target = clip_targets(labels_N, torch.arange(num_objects), masks_NThw)
    queries_LTN = torch.randint(0, 20, (3, num_frames, num_objects), generator=generator)
    return replace(target, frame_queries_LTN=queries_LTN.where(target.present_NT.t(), -1))


def make_step(sizes: Sequence[tuple[tuple[int, int], int]] = SIZES, num_frames: int = 3) -> Step:
    generator = torch.Generator().manual_seed(7)
    targets = [clip_of(generator, count, num_frames, hw) for hw, count in sizes]
    maps = [torch.randn(num_frames, 64, h // 4 + 2, w // 4 + 2, generator=generator) for (h, w), _ in sizes]
    head = golden_head()
    with torch.no_grad():
        outputs = head(torch.randn(3, len(sizes), num_frames, 20, 64, generator=generator))
        weights = head.fold_masks(outputs.mask_embed_DLBVC, MapDecoding())
    step = Step(outputs, weights, maps, targets)
    for leaf in step.leaves:
        leaf.requires_grad_()
    return step


def random_points(count: int) -> list[PointSource]:
    config = PointConfig(matching=150, loss=200)
    return [RandomPoints.for_clip(config, 3, clip, CPU) for clip in range(count)]


def assert_alike(
    ours: tuple[VitaLosses, list[Tensor]], expected: tuple[VitaLosses, list[Tensor]], tolerance: float = 1e-5
) -> None:
    for one, other in zip(ours[0].matches, expected[0].matches, strict=True):
        assert torch.equal(one.query_DLM, other.query_DLM) and torch.equal(one.object_DLM, other.object_DLM)
    for name in ("class_D", "mask_D", "dice_D", "similarity", "total"):
        torch.testing.assert_close(getattr(ours[0], name), getattr(expected[0], name), rtol=tolerance, atol=0)
    for one, other in zip(ours[1], expected[1], strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
def test_all_clips_at_once_equal_clip_by_clip(options: dict[str, Any]) -> None:
    """Other sizes and counts in every clip, random points: terms, matches, gradients of head outputs and maps."""
    step = make_step()
    results = [
        step.losses(VitaCriterion(batched=batched, **options), random_points(len(SIZES))) for batched in (True, False)
    ]
    assert_alike(*results)


@pytest.mark.parametrize("uncertain", [0.75, 0.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
def test_few_points_without_dense_logits(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], uncertain: float
) -> None:
    """Fewer points than pixels, and maps without gradients: the same as through dense logits."""
    config = PointConfig(matching=15, loss=20, oversample=1.5, uncertain=uncertain)
    used = []
    real = clip_losses.few_point_sums
    monkeypatch.setattr(clip_losses, "few_point_sums", lambda *given: used.append(len(given[0])) or real(*given))
    results = []
    for takes_gradients in (True, False):
        step = make_step()
        for map_TRHW in step.maps:
            map_TRHW.requires_grad_(takes_gradients)
        points: list[PointSource] = [RandomPoints.for_clip(config, 3, clip, CPU) for clip in range(len(SIZES))]
        losses, gradients = step.losses(VitaCriterion(**options), points)
        results.append((losses, gradients[: len(step.leaves) - len(step.maps)]))
        assert bool(used) is not takes_gradients
    assert_alike(results[1], results[0])


def test_in_groups_and_chunks_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    whole = step.losses(VitaCriterion(batched=True), random_points(len(SIZES)))
    monkeypatch.setattr(batch_losses, "_GROUP_NUMBERS", 1 << 20)
    monkeypatch.setattr(batch_losses, "_LOGITS_AT_ONCE", 1 << 16)
    made = []
    make = batch_losses.ClipGroup.of
    monkeypatch.setattr(batch_losses.ClipGroup, "of", lambda clips, *rest: made.append(clips) or make(clips, *rest))
    assert_alike(step.losses(VitaCriterion(batched=True), random_points(len(SIZES))), whole)
    assert [(part.start, part.stop) for part in made] == [(0, 2), (2, 3), (3, 4)]


def test_a_batch_without_objects() -> None:
    step = make_step([((20, 20), 0), ((16, 24), 0)])
    results = [step.losses(VitaCriterion(batched=batched), random_points(2)) for batched in (True, False)]
    for losses, gradients in results:
        assert not losses.mask_D.any() and not losses.similarity and not gradients[1].any()
    torch.testing.assert_close(results[0][0].total, results[1][0].total)


def test_an_empty_clip_larger_than_all_masks_of_the_batch() -> None:
    """Its points lie beyond the end of the others' labels."""
    step = make_step([((8, 8), 1), ((64, 80), 0)], num_frames=1)
    assert_alike(*(step.losses(VitaCriterion(batched=batched), random_points(2)) for batched in (True, False)))


def test_clips_that_share_a_generator_draw_as_they_do_one_by_one() -> None:
    """As the frames of a clip do in the losses of a detector."""
    step = make_step(num_frames=1)
    results = []
    for batched in (True, False):
        (source,) = random_points(1)
        results.append(step.losses(VitaCriterion(batched=batched), [source] * len(SIZES)))
    assert_alike(*results)


@pytest.mark.slow
@pytest.mark.parametrize("logit_type", [torch.bfloat16, torch.float32])
def test_the_compiled_visit_equals_the_plain_one(logit_type: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """Through Inductor's C++ here; on CUDA the same graph becomes a Triton kernel."""
    logits = (8 * torch.randn(3, 20, 501, generator=torch.Generator().manual_seed(0))).to(logit_type)
    visit = fused_visit("cpu", logit_type)
    assert visit is not visit_logits and capsys.readouterr().out == ""
    with torch.no_grad():
        for ours, expected in zip(visit(logits), visit_logits(logits), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_one_line_and_the_plain_visit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise RuntimeError("no Triton here\nand a page of internals")

    monkeypatch.setattr(logit_visits.torch, "compile", lambda *_, **__: refuse)
    fused_visit.cache_clear()
    assert fused_visit("cpu", torch.float32) is visit_logits is fused_visit("cpu", torch.float32)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "no Triton here" in printed and "internals" not in printed
    fused_visit.cache_clear()


@pytest.mark.parametrize("live", [False, True], ids=["from the cache", "with the detector"])
def test_a_whole_step(tiny_data: Path, tiny_cache: Path, tmp_path: Path, live: bool) -> None:
    """Points are as uncertain in both forms, up to their rounding: an odd one may be another."""
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "finetune.short_edges=[64]", "finetune.crop_share=0")
    results = []
    for batched in (True, False):
        source = LiveSource(settings, CPU) if live else CachedSource(settings, open_training_set(settings), CPU)
        if isinstance(source, LiveSource):
            source.criterion = replace(source.criterion, batched=batched)
        trainer: Trainer[Any] = Trainer(settings, source, tmp_path / "none")
        trainer.compute.criterion = replace(trainer.compute.criterion, batched=batched)
        terms = trainer.compute.gradients(trainer.head, next(trainer._batches()))
        parameters = trained_parameters(trainer.parts)
        results.append((terms, [parameter.grad for parameter in parameters]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    largest = max(float(gradient.norm()) for gradient in results[1][1])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert float((one - other).norm()) <= 1e-3 * float(other.norm()) + 1e-5 * largest


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "index", "unique", "equal"}


def operations(num_clips: int, *, batched: bool) -> Counter[str]:
    step = make_step([((48, 64), 4)] * num_clips, num_frames=6)
    points, normalisers = random_points(num_clips), LossNormalisers.of_batch(step.targets, 3, 15)
    leaves = step.leaves[:5]
    maps = [map_TRHW.detach().half() for map_TRHW in step.maps]
    with Operations() as counted:
        losses = VitaCriterion(batched=batched)(
            step.outputs, step.mask_weights, maps, step.targets, points, normalisers
        )
        torch.autograd.grad(losses.total, leaves)
    return counted.counts


def test_eight_clips_take_as_many_operations_as_one() -> None:
    """But for their random points, a draw for the matching and one for the losses, and copies that one clip spares."""
    one, eight = operations(1, batched=True), operations(8, batched=True)
    print(f"\noperations of the losses: 1 clip {one.total()}, 8 clips {eight.total()}")
    assert eight.total() <= one.total() + 3 * 7 and eight.total() < 260
    assert operations(8, batched=False).total() > 5 * eight.total()


def test_nothing_in_between_waits_for_the_device() -> None:
    """Of two clips alike: sizes that depend on values, and numbers that are asked for, would make the host wait."""
    assert not WAITS & operations(2, batched=True).keys()
