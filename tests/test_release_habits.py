"""Habits of the VITA release that change numbers: each is a setting, and the release's way is the default."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cache.errors import ConfigError
from configs.load import load_settings
from configs.schema import PaddedArea
from evaluate.tracks.inference import best_labels
from tests.test_head_parity import GOLDEN, assert_near, golden_head
from tests.test_losses_parity import FixedPoints, step
from train_head.build import build_criterion
from train_head.data.clips import draw_frames
from train_head.heads.contract import HeadConfig
from train_head.heads.vita import VitaHead
from train_head.losses.criterion import VitaCriterion
from train_head.losses.points import sampling_area
from train_head.losses.targets import clip_targets


def test_defaults_are_the_releases() -> None:
    """All but the padded area, which no cache stores."""
    settings = load_settings("demo")
    assert not settings.head.shift_in_training
    assert settings.head.shift_short_videos
    assert settings.loss.absent_frames
    assert settings.train.replacement
    assert settings.evaluate.repeats
    assert settings.loss.padded_area.value == "ignore"


def test_settings_reach_the_losses() -> None:
    criterion = build_criterion(load_settings("demo").loss, torch.device("cpu"))
    assert (criterion.padded_area, criterion.absent_frames) == (PaddedArea.ignore, True)
    overrides = ["loss.padded_area=background", "loss.absent_frames=false"]
    criterion = build_criterion(load_settings("demo", overrides).loss, torch.device("cpu"))
    assert (criterion.padded_area, criterion.absent_frames) == (PaddedArea.background, False)
    with pytest.raises(ConfigError, match="padded_area"):
        load_settings("demo", ["loss.padded_area=foreground"])


def test_background_points_reach_as_far_as_the_stored_map() -> None:
    assert sampling_area((90, 160), (24, 40), PaddedArea.background) == (96, 160)
    assert sampling_area((90, 160), (24, 40), PaddedArea.ignore) == (90, 160)


@pytest.mark.parametrize(("num_frames", "window"), [(1, 6), (7, 7), (7, 12)])
def test_short_videos_unsplit_are_full_attention(num_frames: int, window: int) -> None:
    """The recorded outputs of window 0, for videos that fit one window; a split one differs where T > W / 2."""
    golden = np.load(GOLDEN / "eval.npz")
    queries_TQC = torch.from_numpy(golden["frame_queries"][:num_frames])
    with torch.no_grad():
        whole = golden_head(window=window, shift_short_videos=False).predict(queries_TQC)
        split = golden_head(window=window).predict(queries_TQC)
    assert_near(whole.class_logits_VK, golden[f"win0_T{num_frames}_pred_logits"][0, 0])
    assert_near(whole.mask_embed_VC, golden[f"win0_T{num_frames}_pred_mask_embed"][0, 0])
    difference = float((whole.class_logits_VK - split.class_logits_VK).abs().max())
    assert (difference > 1e-3) == (num_frames > window // 2)


def test_longer_videos_shift_either_way() -> None:
    queries_TQC = torch.from_numpy(np.load(GOLDEN / "eval.npz")["frame_queries"][:7])
    with torch.no_grad():
        one, other = (golden_head(shift_short_videos=chosen).predict(queries_TQC) for chosen in (True, False))
    assert torch.equal(one.class_logits_VK, other.class_logits_VK)


@pytest.mark.parametrize(("video_length", "num_frames"), [(1, 5), (3, 5), (3, 8), (9, 5), (40, 6), (4, 1)])
def test_frames_without_replacement_repeat_only_where_they_must(video_length: int, num_frames: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        frames = draw_frames(rng, video_length, num_frames, frame_range=4, replacement=False)
        assert len(frames) == num_frames and list(frames) == sorted(frames)
        assert any(all(abs(frame - reference) <= 4 for frame in frames) for reference in frames)
        counts = Counter(frames)
        if video_length > 1:
            others = min(video_length, 5) - 1  # at least this many lie in the range beside the reference
            assert max(counts.values()) <= max(1, -(-(num_frames - 1) // others))


def test_frames_with_replacement_do_repeat() -> None:
    rng = np.random.default_rng(0)
    assert any(len(set(draw_frames(rng, 9, 5, frame_range=4))) < 5 for _ in range(20))


def test_cross_entropy_without_absent_frames() -> None:
    """Two queries, one object of three frames that is absent in the second, against the definition."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    sizes = {"num_queries": 2, "hidden_dim": 8, "num_heads": 2, "ffn_dim": 8, "enc_layers": 1, "dec_layers": 2}
    head = VitaHead(
        HeadConfig(num_classes=3, num_frame_queries=4, mask_dim=8, detector_dim=8, map_dim=5, use_sim=False, **sizes)
    )
    masks_NThw = torch.rand(1, 3, 16, 20, generator=generator) > 0.5
    masks_NThw[:, 1] = False
    target = clip_targets(torch.tensor([1]), torch.tensor([0]), masks_NThw)
    map_TRHW = torch.randn(3, 5, 4, 5, generator=generator)
    points = FixedPoints(torch.rand(30, 2, generator=generator))
    queries_LBTQC = torch.randn(1, 1, 3, 4, 8, generator=generator)
    with torch.no_grad():
        everywhere = step(head, queries_LBTQC, [map_TRHW], [target], points, VitaCriterion())
        present = step(head, queries_LBTQC, [map_TRHW], [target], points, VitaCriterion(absent_frames=False))
        embed_DVC = head(queries_LBTQC).mask_embed_DLBVC[:, 0, 0]
        convolved = head.vita_mask_features(map_TRHW)
    grid = (points.points_P2 * 2 - 1)[None, None].expand(3, -1, -1, -1)
    for depth in range(2):
        query = int(present.matches[0].query_DLM[depth, 0, 0])
        logits_T1HW = torch.einsum("c,tchw->thw", embed_DVC[depth, query], convolved)[:, None]
        x_TP = F.grid_sample(logits_T1HW, grid, align_corners=False)[:, 0, 0]
        t_TP = F.grid_sample(masks_NThw[0, :, None].float(), grid, align_corners=False)[:, 0, 0]
        losses_T = F.binary_cross_entropy_with_logits(x_TP, t_TP, reduction="none").mean(dim=1)
        assert float(present.mask_D[depth]) == pytest.approx(float(losses_T[[0, 2]].mean()), rel=1e-4)
        assert float(everywhere.mask_D[depth]) == pytest.approx(float(losses_T.mean()), rel=1e-4)
    torch.testing.assert_close(present.dice_D, everywhere.dice_D)


def test_tracks_without_repeats_have_one_label_per_query() -> None:
    probability_VK = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.7], [0.1, 0.6, 0.5]])

    def found(top_k: int, repeats: bool) -> list[tuple[int, int, float]]:
        best = best_labels(probability_VK, top_k, repeats)
        queries = best.queries_M[best.row_N].tolist()
        scores = [round(score, 3) for score in best.class_scores_N.tolist()]
        return list(zip(queries, best.labels_N.tolist(), scores, strict=True))

    assert found(3, repeats=True) == [(0, 0, 0.9), (0, 1, 0.8), (1, 2, 0.7)]
    assert found(3, repeats=False) == [(0, 0, 0.9), (1, 2, 0.7), (2, 1, 0.6)]
    assert found(10, repeats=False) == found(3, repeats=False)
