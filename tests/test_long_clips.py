"""Clips of more frames than one encoder window: training with shifted windows sees what inference sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import tiny_settings
from train_head.heads.contract import HeadConfig
from train_head.heads.vita import VitaHead
from train_head.run_folder import read_metrics_log
from train_head.trainer import train


def head_of(window: int, shift_in_training: bool = False) -> VitaHead:
    torch.manual_seed(window)
    return VitaHead(
        HeadConfig(
            num_classes=3,
            num_frame_queries=4,
            num_queries=5,
            hidden_dim=16,
            num_heads=2,
            ffn_dim=32,
            enc_layers=3,
            dec_layers=2,
            window=window,
            mask_dim=8,
            detector_dim=16,
            map_dim=8,
            shift_in_training=shift_in_training,
        )
    ).eval()


@pytest.mark.parametrize("num_frames", [5, 6, 7, 12, 13, 36])
@pytest.mark.parametrize("window", [3, 6])
def test_shifted_windows_of_training_are_those_of_inference(window: int, num_frames: int) -> None:
    queries_TQC = torch.randn(num_frames, 4, 16, generator=torch.Generator().manual_seed(num_frames))
    with torch.no_grad():
        expected = head_of(window).predict(queries_TQC)
        shifted, unshifted = (head_of(window, shift)(queries_TQC[None, None]) for shift in (True, False))
    torch.testing.assert_close(shifted.class_logits_DLBVK[-1, 0, 0], expected.class_logits_VK)
    torch.testing.assert_close(shifted.mask_embed_DLBVC[-1, 0, 0], expected.mask_embed_VC)
    assert not torch.allclose(unshifted.class_logits_DLBVK[-1, 0, 0], expected.class_logits_VK, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_frame_reaches_as_far_as_windows_and_shifts_say(layers: int) -> None:
    """Worked by hand for W = 4: windows start at 0, 4, 8 and, shifted, at 2, 6 (before 2: a window of two frames)."""
    head = head_of(4)
    head.enc_self_attn = nn.ModuleList(head.enc_self_attn[index % 3] for index in range(layers))
    head.enc_ffn = nn.ModuleList(head.enc_ffn[index % 3] for index in range(layers))
    queries = torch.randn(1, 12, 4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    # A plain sum over what a LayerNorm returns does not depend on its input, so its gradient is zero but for rounding.
    weights = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((head.encode(queries, shift=True)[0, 5] * weights).sum(), queries)
    reached = gradient[0].abs().sum((1, 2)).nonzero().flatten().tolist()
    assert reached == {1: [4, 5, 6, 7], 2: list(range(8)), 4: list(range(12))}[layers]


def test_training_takes_long_clips_with_shifts(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    losses = []
    for name, shift in (("shifted", "true"), ("plain", "false")):
        words = ["train.num_frames=12", "head.window=3", f"head.shift_in_training={shift}", f"name={name}"]
        train(tiny_settings(tiny_data, tiny_cache, tmp_path, *words, "train.iterations=2"))
        losses.append([entry["loss"] for entry in read_metrics_log(tmp_path / name)])
    assert len(losses[0]) == 2 and losses[0][0] != losses[1][0]
