"""The head in blocks against the head at once, for every window, length, block size and share of tokens kept."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache.errors import CacheError
from tests.test_head_parity import GOLDEN, TOLERANCE, assert_near, golden_head
from train_head.heads.contract import HeadConfig
from train_head.heads.frame_spill import FrameSpill, TokenBlock
from train_head.heads.streaming import predict_stream
from train_head.heads.vita import VitaHead

SLOTS = 7


@functools.cache
def small_head(enc_layers: int, dec_layers: int) -> VitaHead:
    torch.manual_seed(enc_layers)
    sizes = {"hidden_dim": 8, "num_heads": 2, "ffn_dim": 16, "mask_dim": 4, "detector_dim": 6, "map_dim": 4}
    config = HeadConfig(
        num_classes=3, num_frame_queries=SLOTS, num_queries=5, enc_layers=enc_layers, dec_layers=dec_layers, **sizes
    )
    head = VitaHead(config).eval()
    with torch.no_grad():
        for layer in (*head.enc_self_attn, *head.transformer_cross_attention_layers):
            for parameter in layer.parameters():
                parameter.mul_(2)  # sharp attention: mistakes in the groups or in the sums show
    return head


def blocks_of(tokens_TQC: Tensor, slots_TQ: Tensor | None, sizes: list[int]) -> Iterator[TokenBlock]:
    """Blocks of the sizes given, over and over."""
    first = 0
    while first < len(tokens_TQC):
        for size in sizes:
            part = tokens_TQC[first : first + size]
            if len(part):
                chosen = None if slots_TQ is None else slots_TQ[first : first + size]
                yield (
                    TokenBlock.whole_frames(part) if chosen is None else TokenBlock(tokens_tqC=part, slots_tq=chosen)
                )
            first += size


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_frames=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    window=st.integers(0, 7),
    enc_layers=st.integers(0, 4),
    dec_layers=st.integers(1, 3),
    shift_short=st.booleans(),
    held_bytes=st.sampled_from([0, 1000, 10**9]),
    seed=st.integers(0, 99),
)
def test_blocks_give_the_numbers_of_the_whole(
    num_frames: int,
    sizes: list[int],
    window: int,
    enc_layers: int,
    dec_layers: int,
    shift_short: bool,
    held_bytes: int,
    seed: int,
) -> None:
    head = small_head(enc_layers, dec_layers)
    object.__setattr__(head.config, "window", window)
    object.__setattr__(head.config, "shift_short_videos", shift_short)
    tokens_TQC = 3 * torch.randn(num_frames, SLOTS, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = head.predict(tokens_TQC)
    actual = predict_stream(head, blocks_of(tokens_TQC, None, sizes), num_frames, held_bytes)
    torch.testing.assert_close(actual.class_logits_VK, expected.class_logits_VK, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.mask_embed_VC, expected.mask_embed_VC, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "num_frames"), [*((6, T) for T in (1, 5, 6, 7, 12, 13, 29)), (0, 7)])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_blocks_give_the_original_s_numbers(window: int, num_frames: int, size: int) -> None:
    golden = np.load(GOLDEN / "eval.npz")
    prefix = f"T{num_frames}" if window else f"win0_T{num_frames}"
    tokens_TQC = torch.from_numpy(golden["frame_queries"][:num_frames])
    head = golden_head(window=window)
    outputs = predict_stream(head, blocks_of(tokens_TQC, None, [size]), num_frames, held_bytes=0)
    assert_near(outputs.class_logits_VK, golden[f"{prefix}_pred_logits"][0, 0], TOLERANCE)
    assert_near(outputs.mask_embed_VC, golden[f"{prefix}_pred_mask_embed"][0, 0], TOLERANCE)


@pytest.mark.parametrize("held_bytes", [0, 10**9])
def test_tokens_keep_the_positions_of_their_slots(held_bytes: int) -> None:
    """Tokens in another order, with their slots, are the same video; with others' slots they are not."""
    head = small_head(2, 2)
    generator = torch.Generator().manual_seed(0)
    tokens_TQC = torch.randn(5, SLOTS, 6, generator=generator)
    slots_TQ = torch.stack([torch.randperm(SLOTS, generator=generator) for _ in range(5)])
    shuffled_TQC = torch.take_along_dim(tokens_TQC, slots_TQ[..., None], dim=1)
    with torch.no_grad():
        expected = head.predict(tokens_TQC).class_logits_VK
    same = predict_stream(head, blocks_of(shuffled_TQC, slots_TQ, [2]), 5, held_bytes).class_logits_VK
    other = predict_stream(head, blocks_of(shuffled_TQC, None, [2]), 5, held_bytes).class_logits_VK
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-3)


def test_spilled_blocks_come_back_as_often_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    added = [TokenBlock.whole_frames(torch.randn(t, 3, 4, generator=generator)) for t in (2, 1, 5)]
    with FrameSpill(held_bytes=2 * 3 * 4 * 4) as spill:
        for block in added:
            spill.add(block)
        for _ in range(2):
            for block, stored in zip(added, spill, strict=True):
                assert torch.equal(block.tokens_tqC, stored.tokens_tqC)
                assert torch.equal(block.slots_tq, stored.slots_tq)


def test_a_full_disk_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CacheError, match="set TMPDIR"):
        predict_stream(small_head(1, 1), blocks_of(torch.zeros(1, SLOTS, 6), None, [1]), 10**15)
