"""The head against the original VITA's numbers (tests/golden/vita_head), on the paths that users run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from train_head.heads.contract import HeadConfig, HeadOutputs
from train_head.heads.layers import MultiheadAttention, SelfAttentionLayer, window_runs
from train_head.heads.mask_folding import MapDecoding, fold_mask_embeddings
from train_head.heads.vita import VitaHead, strip_release_prefix

GOLDEN = Path(__file__).parent / "golden" / "vita_head"
TOLERANCE = 2e-5


def golden_config(**changes: int) -> HeadConfig:
    sizes = {
        "num_classes": 5,
        "num_frame_queries": 20,
        "num_queries": 15,
        "hidden_dim": 64,
        "num_heads": 8,
        "ffn_dim": 128,
        "enc_layers": 3,
        "dec_layers": 6,
        "window": 6,
        "mask_dim": 64,
        "detector_dim": 64,
        "map_dim": 64,
    }
    return HeadConfig(**(sizes | changes))


def golden_head(**changes: int) -> VitaHead:
    head = VitaHead(golden_config(**changes))
    state = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "state.npz").items()}
    head.load_state_dict(strip_release_prefix(state))
    return head


def assert_near(actual: torch.Tensor, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert float((actual.detach() - torch.from_numpy(expected)).abs().max()) <= tolerance


@pytest.mark.parametrize(("window", "num_frames"), [*((6, T) for T in (1, 5, 6, 7, 12, 13, 29)), (0, 1), (0, 7)])
def test_whole_video_outputs(window: int, num_frames: int) -> None:
    golden = np.load(GOLDEN / "eval.npz")
    prefix = f"T{num_frames}" if window else f"win0_T{num_frames}"
    head = golden_head(window=window)
    frame_queries_TQC = torch.from_numpy(golden["frame_queries"][:num_frames])
    with torch.no_grad():
        outputs = head.predict(frame_queries_TQC)
        encoded = head.encode(frame_queries_TQC[None], shift=True)[0]
    assert_near(outputs.class_logits_VK, golden[f"{prefix}_pred_logits"][0, 0])
    assert_near(outputs.mask_embed_VC, golden[f"{prefix}_pred_mask_embed"][0, 0])
    assert_near(encoded, golden[f"{prefix}_encoder"])


def test_training_outputs_of_all_layers() -> None:
    golden = np.load(GOLDEN / "train.npz")
    head = golden_head()
    queries_LBTQC = torch.from_numpy(golden["frame_queries"]).unflatten(1, (2, 5))
    with torch.no_grad():
        outputs: HeadOutputs = head(queries_LBTQC)
        similarity_DLBVC = head.sim_embed_clip(outputs.video_queries_DLBVC)
    assert outputs.clip_similarity_LBVC is not None and outputs.frame_similarity_LBTQC is not None
    for layer, prefix in enumerate([*(f"aux{index}_" for index in range(5)), ""]):
        assert_near(outputs.class_logits_DLBVK[layer], golden[f"{prefix}pred_logits"])
        assert_near(outputs.mask_embed_DLBVC[layer], golden[f"{prefix}pred_mask_embed"])
        assert_near(similarity_DLBVC[layer], golden[f"{prefix}pred_cq_embed"])
    assert_near(outputs.clip_similarity_LBVC, golden["pred_cq_embed"])
    assert_near(outputs.frame_similarity_LBTQC, golden["pred_fq_embed"])


def test_folded_masks_equal_the_convolved_ones() -> None:
    golden = np.load(GOLDEN / "train.npz")
    head = golden_head()
    map_TRHW = torch.from_numpy(golden["raw_mask_features"][5:])
    embed_VC = torch.from_numpy(golden["pred_mask_embed"][2, 1])
    with torch.no_grad():
        logits_TVHW = head.fold_masks(embed_VC, MapDecoding()).logits(map_TRHW)
        convolved = head.vita_mask_features(map_TRHW)
    assert_near(convolved, golden["vita_mask_features_out"][1])
    assert_near(logits_TVHW.transpose(0, 1), golden["pred_masks_l2_b1"], 1e-4)


def test_folding_a_codec_equals_decompressing() -> None:
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(3, 7, 6, generator=generator)
    matrix_CR, mean_C = torch.randn(5, 4, generator=generator), torch.randn(5, generator=generator)
    conv = torch.nn.Conv2d(5, 6, 1)
    stored_TRHW = torch.randn(2, 4, 3, 3, generator=generator)
    decompressed = torch.einsum("cr,trhw->tchw", matrix_CR, stored_TRHW) + mean_C[:, None, None]
    with torch.no_grad():
        expected = torch.einsum("bqc,tchw->tbqhw", embed, conv(decompressed))
        folded = fold_mask_embeddings(
            embed, conv.weight.flatten(1), conv.bias, MapDecoding(matrix_CR=matrix_CR, mean_C=mean_C)
        )
        actual = torch.einsum("bqr,trhw->tbqhw", folded.weights_R, stored_TRHW) + folded.const[..., None, None]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def masked_window_attention(layer: SelfAttentionLayer, frames: torch.Tensor, W: int, shifted: bool) -> torch.Tensor:
    """Pad, roll, mask and attend frame by frame: slow and literal."""
    T, _, C = frames.shape
    padded_T = -(-T // W) * W
    source = [(slot - (-(-W // 2) if shifted else 0)) % padded_T for slot in range(padded_T)]
    output = torch.zeros_like(frames)
    reference = torch.nn.MultiheadAttention(C, layer.self_attn.num_heads, batch_first=True)
    reference.load_state_dict(layer.self_attn.state_dict())
    for frame in range(T):
        slot = source.index(frame)
        window = range(slot // W * W, slot // W * W + W)
        wrapped = [shifted and source[other] > other for other in window]
        mine = wrapped[slot % W]
        seen = [
            source[o] for o, is_wrapped in zip(window, wrapped, strict=True) if is_wrapped == mine and source[o] < T
        ]
        keys = torch.cat([frames[other] for other in seen])[None]
        output[frame] = reference(frames[frame][None], keys, keys)[0][0]
    return layer.norm(frames + output)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_runs_equal_padding_and_masks(window: int, shifted: bool) -> None:
    torch.manual_seed(window)
    layer = SelfAttentionLayer(8, 2)
    for num_frames in (1, 2, 3, 4, 7, 12, 13):
        frames = torch.randn(2, num_frames, 3, 8)
        with torch.no_grad():
            actual = layer.forward_runs(frames, window_runs(num_frames, window, shifted))
            expected = torch.stack([masked_window_attention(layer, clip, window, shifted) for clip in frames])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("depth", "enc_layers", "dec_layers"), [("6dec3", 6, 3), ("3dec6", 3, 6)])
def test_names_and_shapes_are_the_release_s(depth: str, enc_layers: int, dec_layers: int) -> None:
    keys = json.loads((GOLDEN.parent / f"keys_vita_r50_enc{depth}.json").read_text())
    with torch.device("meta"):
        head = VitaHead(HeadConfig(num_classes=40, enc_layers=enc_layers, dec_layers=dec_layers))
    ours = {f"vita_module.{name}": list(value.shape) for name, value in head.state_dict().items()}
    assert ours == {name: shape for name, shape in keys.items() if name.startswith("vita_module.")}


def test_initial_weights_are_spread_like_the_release_s() -> None:
    torch.manual_seed(0)
    head = VitaHead(golden_config())
    attention = head.enc_self_attn[0].self_attn
    assert isinstance(attention, MultiheadAttention)
    bound = (6 / (64 + 192)) ** 0.5  # Xavier-uniform of the stacked (3C, C) matrix
    assert 0.98 * bound < float(attention.in_proj_weight.detach().abs().max()) <= bound
    bound = (3 / 64) ** 0.5  # Caffe2's Xavier fill: Kaiming-uniform with a = 1
    assert 0.98 * bound < float(head.vita_mask_features.weight.detach().abs().max()) <= bound
    assert 0.9 < float(head.query_feat.weight.detach().std()) < 1.1
