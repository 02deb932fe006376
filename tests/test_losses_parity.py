"""Matching, losses, gradients and targets against the original VITA's numbers (tests/golden/vita_head)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import PaddedArea
from tests.test_head_parity import GOLDEN, golden_head
from train_head.bench.problem import FixedPoints
from train_head.heads.mask_folding import MapDecoding
from train_head.heads.vita import VitaHead
from train_head.losses.criterion import LossNormalisers, VitaCriterion, VitaLosses
from train_head.losses.points import RandomPoints
from train_head.losses.targets import ClipTargets, clip_targets

Recorded = tuple[VitaHead, Tensor, Tensor, VitaLosses]
EXPECTED = json.loads((GOLDEN / "losses.json").read_text())


def unpack(bits: np.ndarray, width: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, axis=-1)[..., :width])


def golden_targets() -> list[ClipTargets]:
    golden = np.load(GOLDEN / "targets.npz")
    result = []
    for clip in range(2):
        masks_TNhw = unpack(golden[f"in{clip}_masks"], int(golden[f"in{clip}_size"][1]))
        labels_N = torch.from_numpy(golden[f"in{clip}_classes"]).amax(dim=0)
        identities_N = torch.from_numpy(golden[f"in{clip}_ids"]).amax(dim=0)
        target = clip_targets(labels_N, identities_N, masks_TNhw.transpose(0, 1).contiguous())
        result.append(replace(target, frame_queries_LTN=golden_frame_queries(target, clip)))
    return result


def golden_frame_queries(target: ClipTargets, clip: int) -> Tensor:
    """The recorded frame-level matches, which number a frame's objects among those present in it."""
    N, T = target.present_NT.shape
    queries_LTN = torch.full((3, T, N), -1)
    for layer in range(3):
        for frame in range(T):
            present = target.present_NT[:, frame].nonzero().flatten()
            queries, objects = EXPECTED["fg_indices"][layer][clip * T + frame]
            queries_LTN[layer, frame, present[objects]] = torch.tensor(queries)
    return queries_LTN


@pytest.fixture(scope="module", params=[False, True], ids=["clip by clip", "batched"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    """Forward, losses and backward of the recorded step, in both forms of the losses."""
    golden = np.load(GOLDEN / "train.npz")
    head = golden_head()
    queries = torch.from_numpy(golden["frame_queries"]).requires_grad_()
    maps = torch.from_numpy(golden["raw_mask_features"]).requires_grad_()
    points = FixedPoints(torch.from_numpy(np.load(GOLDEN / "targets.npz")["points"]))
    losses = step(
        head,
        queries.unflatten(1, (2, 5)),
        maps.unflatten(0, (2, 5)).unbind(),
        golden_targets(),
        points,
        VitaCriterion(padded_area=PaddedArea.background, batched=request.param),
    )
    losses.total.backward()
    return head, queries, maps, losses


def step(
    head: VitaHead,
    queries_LBTQC: Tensor,
    maps: Sequence[Tensor],
    targets: Sequence[ClipTargets],
    points: FixedPoints | RandomPoints,
    criterion: VitaCriterion,
) -> VitaLosses:
    outputs = head(queries_LBTQC)
    weights = head.fold_masks(outputs.mask_embed_DLBVC, MapDecoding())
    normalisers = LossNormalisers.of_batch(targets, queries_LBTQC.shape[0], head.config.num_queries)
    return criterion(outputs, weights, maps, targets, [points] * len(targets), normalisers)


def test_every_loss_term(recorded: Recorded) -> None:
    """Under the release's names: `loss_vita_mask` is the last decoder layer's, `loss_vita_mask_0` the first's."""
    losses = recorded[3]
    named = {"loss_vita_sim": float(losses.similarity.detach())}
    for name, values_D in (("ce", losses.class_D), ("mask", losses.mask_D), ("dice", losses.dice_D)):
        *aux, final = values_D.tolist()
        named |= {f"loss_vita_{name}": final} | {f"loss_vita_{name}_{layer}": value for layer, value in enumerate(aux)}
    assert named == pytest.approx(EXPECTED["losses_unweighted"], rel=1e-4)
    assert float(losses.total.detach()) == pytest.approx(EXPECTED["total"], rel=1e-4)


def test_every_matching(recorded: Recorded) -> None:
    for depth, expected in enumerate([*EXPECTED["matcher_aux"], EXPECTED["matcher_final"]]):
        for problem, (queries, objects) in enumerate(expected):
            match = recorded[3].matches[problem % 2]
            ours = (m[depth, problem // 2].tolist() for m in (match.query_DLM, match.object_DLM))
            assert sorted(zip(*ours, strict=True)) == list(zip(queries, objects, strict=True))


def test_gradient_of_every_parameter(recorded: Recorded) -> None:
    parameters = dict(recorded[0].named_parameters(prefix="vita_module"))
    assert parameters.keys() == EXPECTED["grad"].keys()
    for name, expected in EXPECTED["grad"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        norm = expected["norm"]
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-5), name
        # A sum or an entry may cancel to nearly nothing: its error is that of the whole gradient.
        assert float(gradient.sum()) == pytest.approx(expected["sum"], rel=1e-4, abs=1e-4 * norm + 1e-5), name
        assert gradient.flatten()[:4].tolist() == pytest.approx(expected["first"], rel=1e-4, abs=1e-4 * norm + 1e-6), (
            name
        )


def test_gradient_of_the_inputs(recorded: Recorded) -> None:
    _, queries, maps, _ = recorded
    assert queries.grad is not None and maps.grad is not None
    expected = EXPECTED["grad_input"]
    assert float(queries.grad.norm()) == pytest.approx(expected["frame_queries"], rel=1e-4)
    assert float(maps.grad.norm()) == pytest.approx(expected["raw_mask_features"], rel=1e-4)
    layers = [float(layer.norm()) for layer in queries.grad]
    assert layers == pytest.approx(expected["frame_queries_per_layer"], rel=1e-4)


def test_target_preparation() -> None:
    golden = np.load(GOLDEN / "targets.npz")
    for clip, target in enumerate(golden_targets()):
        h, w = target.image_hw
        assert target.labels_N.tolist() == golden[f"clip{clip}_labels"].tolist()
        padded_NThw = unpack(golden[f"clip{clip}_masks"], 64)
        assert torch.equal(target.masks_NThw, padded_NThw[:, :, :h, :w])
        assert padded_NThw.sum() == target.masks_NThw.sum()
        shifted_N = target.identities_N - target.identities_N.min()
        identities_NT = torch.where(target.present_NT, shifted_N[:, None], -1)
        assert identities_NT.tolist() == golden[f"clip{clip}_ids"].tolist()
        for frame in range(5):
            present_N = target.present_NT[:, frame]
            assert target.labels_N[present_N].tolist() == golden[f"frame{clip * 5 + frame}_labels"].tolist()
            assert shifted_N[present_N].tolist() == golden[f"frame{clip * 5 + frame}_ids"].tolist()


def test_losses_stay_float32_under_bfloat16_autocast() -> None:
    golden = np.load(GOLDEN / "train.npz")
    head, points = golden_head(), FixedPoints(torch.from_numpy(np.load(GOLDEN / "targets.npz")["points"]))
    queries_LBTQC = torch.from_numpy(golden["frame_queries"]).unflatten(1, (2, 5))
    maps = torch.from_numpy(golden["raw_mask_features"]).unflatten(0, (2, 5)).unbind()
    criterion = VitaCriterion(padded_area=PaddedArea.background)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(head, queries_LBTQC, maps, golden_targets(), points, criterion)
    losses.total.backward()
    assert losses.total.dtype == losses.mask_D.dtype == losses.class_D.dtype == torch.float32
    assert float(losses.total.detach()) == pytest.approx(EXPECTED["total"], rel=0.03)
    assert all(parameter.grad is not None for parameter in head.parameters())
