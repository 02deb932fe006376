"""Weights, seeds and shares of the settings, none at its default: each acts as what it means says, computed anew."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from cache.labels.annotations import load_labels
from configs.schema import LossSettings, Settings
from evaluate.tracks.predictors import head_predictor
from tests.conftest import tiny_settings
from tests.device_steps import open_trainer
from tests.test_frame_matches import HW, literal_cost
from train_head.bench.problem import FixedPoints
from train_head.build import build_criterion, learning_rate
from train_head.data.video_sets import chosen_videos, open_evaluation_set
from train_head.heads.contract import HeadOutputs
from train_head.heads.mask_folding import MaskWeights
from train_head.losses.criterion import LossNormalisers
from train_head.losses.matcher import CostWeights
from train_head.losses.targets import clip_targets

D, L, V, N, K, R, P = 2, 2, 6, 3, 4, 5, 60


@pytest.mark.parametrize("weights", [(30.0, 1.0, 1.0), (1.0, 30.0, 1.0), (1.0, 1.0, 30.0)])
@pytest.mark.parametrize("batched", [False, True])
def test_tracks_are_matched_by_the_weights_of_the_losses(weights: tuple[float, float, float], batched: bool) -> None:
    """In a clip of one frame, whose costs are those of `literal_cost`."""
    generator = torch.Generator().manual_seed(5)
    logits_DLBVK = 3 * torch.randn(D, L, 1, V, K + 1, generator=generator)
    outputs = HeadOutputs(
        class_logits_DLBVK=logits_DLBVK,
        mask_embed_DLBVC=torch.zeros(D, L, 1, V, R),
        video_queries_DLBVC=torch.zeros(D, L, 1, V, R),
        clip_similarity_LBVC=None,
        frame_similarity_LBTQC=None,
    )
    folded = MaskWeights(
        weights_R=torch.randn(D, L, 1, V, R, generator=generator), const=torch.randn(D, L, 1, V, generator=generator)
    )
    map_1RHW = torch.randn(1, R, 7, 9, generator=generator)  # ceil of 22 x 30 / 4, and one more
    masks_N1hw = (torch.rand(N, 1, *HW, generator=generator) > 0.6).byte()
    target = clip_targets(torch.tensor([2, 0, 2]), torch.arange(N), masks_N1hw)
    points_P2 = torch.rand(P, 2, generator=generator)
    label, mask, dice = weights
    chosen = LossSettings(class_weight=label, mask_weight=mask, dice_weight=dice)
    criterion = replace(build_criterion(chosen, torch.device("cpu")), batched=batched)
    normalisers = LossNormalisers.of_batch([target], L, V)
    (match,) = criterion(outputs, folded, [map_1RHW], [target], [FixedPoints(points_P2)], normalisers).matches
    costs = CostWeights(label=label, mask=mask, dice=dice)
    for depth in range(D):
        for layer in range(L):
            probability_VK = logits_DLBVK[depth, layer, 0].softmax(-1)
            weights_VR, const_V = folded.weights_R[depth, layer, 0], folded.const[depth, layer, 0]
            logits_VHW = torch.einsum("vr,rhw->vhw", weights_VR, map_1RHW[0]) + const_V[:, None, None]
            cost_VN = [
                [
                    literal_cost(
                        probability_VK[v], logits_VHW[v], masks_N1hw[n, 0], [int(target.labels_N[n])], points_P2, costs
                    )
                    for n in range(N)
                ]
                for v in range(V)
            ]
            rows, columns = linear_sum_assignment(np.array(cost_VN))
            ours = zip(match.query_DLM[depth, layer].tolist(), match.object_DLM[depth, layer].tolist(), strict=True)
            assert set(ours) == set(zip(rows.tolist(), columns.tolist(), strict=True))


def test_every_loss_term_and_no_object_have_the_weight_of_the_settings(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """The class term is a weighted mean: over all queries of the batch, with 1 for objects and 0.4 for none."""
    words = ("loss.class_weight=3", "loss.mask_weight=7", "loss.dice_weight=11", "loss.sim_weight=0.25")
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, *words, "loss.no_object_weight=0.4", "train.workers=0")
    trainer = open_trainer(settings, "cpu")
    clips = next(trainer._batches())
    targets = [trainer.source.targets(clip) for clip in clips]
    normalisers = trainer.compute.normalisers(targets)
    features = trainer.source.features(clips, targets, normalisers.frames)
    losses = trainer.compute.head_losses(trainer.head, clips, features, normalisers.clips)
    terms = (losses.class_D.sum(), losses.mask_D.sum(), losses.dice_D.sum(), losses.similarity)
    expected = sum(weight * float(term.detach()) for weight, term in zip((3, 7, 11, 0.25), terms, strict=True))
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-6)

    logits_DLBVK = trainer.head(features.frame_queries_LBTQC).class_logits_DLBVK.detach()
    nothing = logits_DLBVK.shape[-1] - 1
    for depth, logits_LBVK in enumerate(logits_DLBVK):
        wanted_LBV = torch.full(logits_LBVK.shape[:-1], nothing)
        for clip, (target, match) in enumerate(zip(targets, losses.matches, strict=True)):
            for layer, (queries, objects) in enumerate(
                zip(match.query_DLM[depth], match.object_DLM[depth], strict=True)
            ):
                wanted_LBV[layer, clip, queries] = target.labels_N[objects]
        weights_K = torch.tensor([1.0] * nothing + [0.4])
        mean = F.cross_entropy(logits_LBVK.flatten(0, 2), wanted_LBV.flatten(), weights_K, reduction="mean")
        assert float(losses.class_D[depth].detach()) == pytest.approx(float(mean), rel=1e-5)

    num_queries = trainer.source.sizes.num_queries
    objects = [int(count) for target in targets for count in target.present_NT.sum(dim=0)]
    frames = sum(count + 0.4 * (num_queries - count) for count in objects)
    assert float(normalisers.frames.class_weight) == pytest.approx(frames)


def test_the_learning_rate_falls_by_the_factor_of_the_settings() -> None:
    settings = Settings()
    settings.train.learning_rate, settings.train.warmup = 1.0, 0
    settings.train.decay_steps, settings.train.decay_factor = [2, 3], 0.4
    assert [learning_rate(settings, step) for step in range(5)] == pytest.approx([1, 1, 0.4, 0.16, 0.16])


def test_another_seed_holds_out_other_videos(tiny_data: Path) -> None:
    labels = load_labels(tiny_data / "train.json")
    settings, held_out = Settings(), set()
    settings.data.holdout = 0.4
    for settings.data.holdout_seed in range(6):
        draws = {
            int(hashlib.sha256(f"{settings.data.holdout_seed}:{video.name}".encode()).hexdigest(), 16): video.id
            for video in labels.videos
        }
        expected = {video_id for draw, video_id in draws.items() if draw < int(0.4 * 2**256)} or {draws[min(draws)]}
        chosen = {video.id for video in chosen_videos(settings, "holdout", labels)[0].videos}
        assert chosen == expected and len(chosen) < len(labels.videos)
        held_out.add(frozenset(chosen))
    assert len(held_out) > 3


def test_the_head_sees_the_share_of_queries_that_is_kept(tiny_run: Settings) -> None:
    settings = replace(tiny_run, evaluate=replace(tiny_run.evaluate, keep_queries=0.3, chunk_frames=4))
    videos = open_evaluation_set(settings)
    cached, arrays = videos.feature_cache.video("1"), videos.feature_cache.heads.arrays
    blocks = list(head_predictor(settings, videos).tokens(cached, range(6)))
    assert [len(block.slots_tq) for block in blocks] == [4, 2]
    queries_TQC = torch.from_numpy(cached.frame_queries(range(6))[:, -1]).float()
    norm = [torch.from_numpy(arrays[f"decoder_norm.{name}"]) for name in ("weight", "bias")]
    normed_TQC = F.layer_norm(queries_TQC, queries_TQC.shape[-1:], *norm)
    logits = F.linear(normed_TQC, *(torch.from_numpy(arrays[f"class_embed.{name}"]) for name in ("weight", "bias")))
    nothing_TQ = logits.softmax(-1)[..., -1].numpy()
    count = round(0.3 * nothing_TQ.shape[1])
    kept = torch.cat([block.slots_tq for block in blocks]).tolist()
    assert kept == [sorted(np.argsort(nothing_Q, kind="stable")[:count].tolist()) for nothing_Q in nothing_TQ]
