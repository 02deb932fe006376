"""What every head owes to trainer, losses, checkpoint and inference, and the example's numbers from loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.errors import ConfigError, WeightsError
from configs.schema import HeadKind, Settings
from evaluate.ablate import ablate
from evaluate.compare.groups import read_groups
from evaluate.compare.result import compare
from evaluate.stage import evaluate
from tests.conftest import tiny_settings
from tests.operations import Operations
from tests.train_until import before_step, interrupt
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.heads.contract import HeadConfig, HeadOutputs, TrackHead
from train_head.heads.example_head import GruHead
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.kinds import HEADS, build_head
from train_head.heads.layers import MultiheadAttention
from train_head.heads.mask_folding import MapDecoding
from train_head.parameter_table import head_parameters
from train_head.release import export_file
from train_head.trainer import train

KINDS = pytest.mark.parametrize("kind", list(HeadKind))
L, B, T, Q, V, K = 2, 3, 4, 6, 5, 3


def small_config(kind: HeadKind, *, use_sim: bool = True) -> HeadConfig:
    sizes = {"hidden_dim": 8, "num_heads": 2, "ffn_dim": 16, "mask_dim": 4, "detector_dim": 7, "map_dim": 9}
    return HeadConfig(
        kind=kind, num_classes=K, num_frame_queries=Q, num_queries=V, dec_layers=2, use_sim=use_sim,
        shift_short_videos=False, **sizes,
    )  # fmt: skip


def small_head(kind: HeadKind, *, use_sim: bool = True) -> TrackHead:
    torch.manual_seed(0)
    return build_head(small_config(kind, use_sim=use_sim))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 7, generator=torch.Generator().manual_seed(1))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_kind_has_a_head() -> None:
    assert set(HEADS) == set(HeadKind)


@KINDS
def test_outputs_have_the_shapes_of_the_contract(kind: HeadKind) -> None:
    outputs: HeadOutputs = small_head(kind)(tokens(L, B, T, Q))
    D = len(outputs.class_logits_DLBVK)
    assert outputs.class_logits_DLBVK.shape == (D, L, B, V, K + 1)
    assert outputs.mask_embed_DLBVC.shape == (D, L, B, V, 4)
    assert outputs.video_queries_DLBVC.shape == (D, L, B, V, 8)
    clip, frame = outputs.clip_similarity_LBVC, outputs.frame_similarity_LBTQC
    assert clip is not None and clip.shape == (L, B, V, 8)
    assert frame is not None and frame.shape == (L, B, T, Q, 8)
    without: HeadOutputs = small_head(kind, use_sim=False)(tokens(L, B, T, Q))
    assert without.clip_similarity_LBVC is None and without.frame_similarity_LBTQC is None


@KINDS
def test_passes_are_independent_and_every_parameter_learns(kind: HeadKind) -> None:
    head, queries_LBTQC = small_head(kind), tokens(L, B, T, Q)
    outputs: HeadOutputs = head(queries_LBTQC)
    alone: HeadOutputs = head(queries_LBTQC[1:, 2:])
    assert_near(alone.class_logits_DLBVK, outputs.class_logits_DLBVK[:, 1:, 2:])
    assert_near(alone.mask_embed_DLBVC, outputs.mask_embed_DLBVC[:, 1:, 2:])
    assert outputs.clip_similarity_LBVC is not None and outputs.frame_similarity_LBTQC is not None
    weights = head.fold_masks(outputs.mask_embed_DLBVC, decoding=MapDecoding())
    said = (outputs.class_logits_DLBVK, weights.weights_R, weights.const, outputs.clip_similarity_LBVC)
    total = sum(((part - 1) ** 2).sum() for part in (*said, outputs.frame_similarity_LBTQC))
    torch.autograd.backward(total)
    still = [name for name, p in head.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert still == []


@KINDS
def test_folded_masks_are_those_of_the_convolved_map(kind: HeadKind) -> None:
    head, embed_VC = small_head(kind), torch.randn(V, 4, generator=torch.Generator().manual_seed(2))
    map_THWC = torch.randn(T, 3, 5, 9, generator=torch.Generator().manual_seed(3))
    map_TCHW = map_THWC.permute(0, 3, 1, 2).contiguous()
    expected_TVHW = torch.einsum("vc,tchw->tvhw", embed_VC, head.vita_mask_features(map_TCHW))
    assert_near(head.fold_masks(embed_VC, MapDecoding()).logits(map_TCHW), expected_TVHW)


@KINDS
@pytest.mark.parametrize("sizes", [[4], [1, 2, 1], [3, 1]])
@torch.no_grad()
def test_a_video_in_blocks_says_what_the_clip_says(kind: HeadKind, sizes: list[int]) -> None:
    head, queries_TQC = small_head(kind).eval(), tokens(T, Q)
    outputs: HeadOutputs = head(queries_TQC[None, None])
    video = head.predict_stream((TokenBlock.whole_frames(part) for part in queries_TQC.split(sizes)), T)
    assert_near(video.class_logits_VK, outputs.class_logits_DLBVK[-1, 0, 0])
    assert_near(video.mask_embed_VC, outputs.mask_embed_DLBVC[-1, 0, 0])


@KINDS
@torch.no_grad()
def test_frames_may_have_fewer_tokens_in_any_order(kind: HeadKind) -> None:
    head, queries_TQC = small_head(kind).eval(), tokens(T, Q)
    slots_Tq = torch.tensor([[0, 2, 5]]).expand(T, -1)
    shuffled_Tq = torch.tensor([[5, 0, 2]]).expand(T, -1)
    first, second = (
        head.predict_stream(
            [TokenBlock(tokens_tqC=torch.take_along_dim(queries_TQC, slots[..., None], 1), slots_tq=slots)], T
        )
        for slots in (slots_Tq, shuffled_Tq)
    )
    assert first.class_logits_VK.shape == (V, K + 1) and first.mask_embed_VC.shape == (V, 4)
    assert_near(first.class_logits_VK, second.class_logits_VK)


@KINDS
def test_the_whole_way_from_cache_to_comparison(
    kind: HeadKind, tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    short = (f"head.kind={kind}", "train.iterations=3", "train.decay_steps=[]", "train.checkpoint_every=2")
    whole, broken = (tiny_settings(tiny_data, tiny_cache, tmp_path, f"name={n}", *short) for n in ("whole", "broken"))
    train(whole)
    with pytest.raises(KeyboardInterrupt), before_step(2, interrupt):
        train(broken)
    train(broken)
    expected, resumed = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "broken"))
    assert type(resumed.build_head("cpu")) is HEADS[kind] and resumed.step == 3
    assert expected.head.keys() == resumed.head.keys()
    assert all(torch.equal(expected.head[name], resumed.head[name]) for name in expected.head)
    metrics = [evaluate(settings).metrics["head"] for settings in (whole, broken)]
    assert metrics[0] is not None and metrics[0] == metrics[1]
    groups = read_groups([f"this={tmp_path / 'whole'}", f"that={tmp_path / 'broken'}"], ["head"])
    this, that = compare(groups, resamples=10, min_score=0.0).rows
    assert this.metrics["AP"].interval.value == pytest.approx(metrics[0].AP) == that.metrics["AP"].interval.value
    assert this.costs.trainable_parameters == sum(head_parameters(expected.config).values())


@pytest.fixture(scope="module")
def gru_run(tiny_data: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    runs = tmp_path_factory.mktemp("gru")
    settings = tiny_settings(
        tiny_data, tiny_cache, runs, "name=gru", "head.kind=gru", "train.iterations=1", "train.decay_steps=[]"
    )
    train(settings)
    return settings


def test_what_only_vita_s_head_can_is_refused(gru_run: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"release's names(.|\n)*head.kind=gru"):
        export_file(Path(gru_run.runs) / "gru", tmp_path / "vita.pth", None)
    with pytest.raises(ConfigError, match=r"has windows(.|\n)*head.kind=gru"):
        ablate("windows", gru_run)


def test_checkpoints_name_their_kind(gru_run: Settings, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    state = torch.load(Path(gru_run.runs) / "gru" / CHECKPOINT, weights_only=True)
    with pytest.raises(ConfigError, match=r"head\.kind is gru"):
        load_checkpoint(Path(gru_run.runs) / "gru" / CHECKPOINT).require_config(small_config(HeadKind.vita), path)
    state["config"]["kind"] = "transformer"
    torch.save(state, path)
    with pytest.raises(WeightsError, match="transformer"):
        load_checkpoint(path)
    del state["config"]["kind"]  # written before there were kinds
    torch.save(state, path)
    assert load_checkpoint(path).config.kind is HeadKind.vita


def attention_by_hand(layer: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own attention with our weights, of one pass."""
    theirs = torch.nn.MultiheadAttention(layer.dim, layer.num_heads, batch_first=True).double()
    theirs.load_state_dict(layer.state_dict())
    attended: Tensor = theirs(query[None], key[None], value[None], need_weights=False)[0][0]
    return attended


def gru_by_hand(cell: torch.nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """The equations of Cho et al. (2014) in PyTorch's form: reset, update, candidate; x read, h state, (V, C)."""
    xr, xz, xn = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, dim=1)
    hr, hz, hn = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, dim=1)
    reset, update = 1 / (1 + torch.exp(-(xr + hr))), 1 / (1 + torch.exp(-(xz + hz)))
    return (1 - update) * torch.tanh(xn + reset * hn) + update * h


@torch.no_grad()
def test_the_example_against_a_naive_loop() -> None:
    head = small_head(HeadKind.gru).double().eval()
    assert isinstance(head, GruHead)
    queries_TQC = tokens(T, Q).double()
    track, state, states = head.track_embed.weight, head.first_state.weight, []
    for frame_QC in queries_TQC:
        seen = frame_QC @ head.input_proj.weight.T + head.input_proj.bias
        read = head.read.norm(state + attention_by_hand(head.read.multihead_attn, state + track, seen, seen))
        placed = read + track
        read = head.compare.norm(read + attention_by_hand(head.compare.self_attn, placed, placed, read))
        inner = (read @ head.ffn.linear1.weight.T + head.ffn.linear1.bias).clamp(min=0)
        read = head.ffn.norm(read + inner @ head.ffn.linear2.weight.T + head.ffn.linear2.bias)
        state = gru_by_hand(head.update, read, state)
        states.append(state.numpy())
    expected_VC = head.norm(torch.from_numpy(np.mean(states, axis=0)))
    outputs: HeadOutputs = head(queries_TQC[None, None])
    assert_near(outputs.video_queries_DLBVC[0, 0, 0], expected_VC)
    assert_near(outputs.class_logits_DLBVK[0, 0, 0], expected_VC @ head.class_embed.weight.T + head.class_embed.bias)


def test_gradients_of_stacked_projections_are_put_together_in_one_piece() -> None:
    """As gradients of slices each would be a stack of zeros: two more operations for a slice, and one to add it up."""
    outputs = small_head(HeadKind.vita)(tokens(L, B, T, Q))
    with Operations() as counted:
        outputs.mask_embed_DLBVC.sum().backward()
    assert "slice_backward" not in counted.counts and counted.counts["cat"] > 0
