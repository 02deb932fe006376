"""Whole-video inference the plain way: what `python -m evaluate bench` measures ours against.

Written for the benchmark from VITA §3 and the release's inference. Windows by padding, rolling and masks through
`torch.nn.MultiheadAttention`; the 1×1 convolution over the whole map; every candidate up-sampled on its own.

Shapes: T frames, Q frame queries, V video queries, C channels, K categories, W frames of a window, N candidates,
H×W the stride-4 map, h×w the masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_head.heads.layers import MultiheadAttention
from train_head.heads.vita import VitaHead

CHUNK = 5  # frames that are up-sampled at once, as in the release


@dataclass(frozen=True, kw_only=True)
class DenseTracks:
    """Candidates as (query, label) with their scores, and their masks."""

    pairs: list[tuple[int, int]]
    scores: list[float]
    masks_NThw: Tensor


@torch.no_grad()
def dense_tracks(
    head: VitaHead, queries_TQC: Tensor, map_TCHW: Tensor, image_hw: tuple[int, int], top_k: int
) -> DenseTracks:
    """The tracks of a video whose masks have the size of the network's input."""
    queries_VC = head.decoder_norm(_decode(head, _encode(head, queries_TQC)))
    probability_VK = head.class_embed(queries_VC).softmax(dim=-1)[:, :-1]
    scores_N, index_N = probability_VK.flatten().topk(top_k)
    num_labels = probability_VK.shape[1]
    embed_NC = head.mask_embed(queries_VC)[index_N // num_labels]
    convolved_TCHW = head.vita_mask_features(map_TCHW.float())
    foreground_N, area_N, masks = torch.zeros(top_k), torch.zeros(top_k), []
    for chunk_tCHW in convolved_TCHW.split(CHUNK):
        logits_NtHW = torch.einsum("nc,tchw->nthw", embed_NC, chunk_tCHW)
        canvas_hw = (4 * logits_NtHW.shape[-2], 4 * logits_NtHW.shape[-1])
        logits_Nthw = F.interpolate(logits_NtHW, size=canvas_hw, mode="bilinear")[..., : image_hw[0], : image_hw[1]]
        soft_Nthw = logits_Nthw.sigmoid()
        hard_Nthw = soft_Nthw > 0.5
        foreground_N += (soft_Nthw * hard_Nthw).flatten(1).sum(dim=1)
        area_N += hard_Nthw.flatten(1).sum(dim=1)
        masks.append(F.interpolate(logits_Nthw, size=image_hw, mode="bilinear") > 0)
    return DenseTracks(
        pairs=[divmod(index, num_labels) for index in index_N.tolist()],
        scores=(scores_N * foreground_N / (area_N + 1e-6)).tolist(),
        masks_NThw=torch.cat(masks, dim=1),
    )


def _attention(ours: nn.Module) -> nn.MultiheadAttention:
    """PyTorch's module with our weights, which have its names."""
    assert isinstance(ours, MultiheadAttention)
    theirs = nn.MultiheadAttention(ours.dim, ours.num_heads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def _encode(head: VitaHead, queries_TQC: Tensor) -> Tensor:
    """Encoded frame queries (T, Q, C)."""
    tokens_TQC = head.input_proj_dec(queries_TQC)
    T, Q, C = tokens_TQC.shape
    window = head.config.window
    padded_T = -(-T // window) * window
    absent_T = torch.arange(padded_T) >= T
    for index, (layer, ffn) in enumerate(zip(head.enc_self_attn, head.enc_ffn, strict=True)):
        roll = -(-window // 2) if index % 2 else 0
        rolled_TQC = F.pad(tokens_TQC, (0, 0, 0, 0, 0, padded_T - T)).roll(roll, dims=0)
        absent_GW = absent_T.roll(roll).view(-1, window)
        wrapped_GW = (torch.arange(padded_T) < roll).view(-1, window)
        # Nobody sees an absent frame (but itself, lest a row be empty), nor the other side of the seam.
        hidden_GWW = absent_GW[:, None] | (wrapped_GW[:, None] != wrapped_GW[..., None])
        hidden_GWW = hidden_GWW & ~torch.eye(window, dtype=torch.bool)
        hidden = hidden_GWW.repeat_interleave(Q, 1).repeat_interleave(Q, 2)
        attention = _attention(layer.get_submodule("self_attn"))
        groups = rolled_TQC.reshape(-1, window * Q, C)
        mask = hidden.repeat_interleave(attention.num_heads, 0)
        attended = attention(groups, groups, groups, attn_mask=mask, need_weights=False)[0]
        attended_TQC = attended.view(padded_T, Q, C).roll(-roll, dims=0)[:T]
        tokens_TQC = ffn(layer.get_submodule("norm")(tokens_TQC + attended_TQC))
    assert isinstance(tokens_TQC, Tensor)
    return tokens_TQC


def _decode(head: VitaHead, tokens_TQC: Tensor) -> Tensor:
    """Video queries (V, C) of the last decoder layer."""
    values_1MC = tokens_TQC.flatten(0, 1)[None]
    keys_1MC = (tokens_TQC + head.fq_pos.weight).flatten(0, 1)[None]
    position_VC, queries = head.query_embed.weight, head.query_feat.weight[None]
    for cross, own, ffn in zip(
        head.transformer_cross_attention_layers,
        head.transformer_self_attention_layers,
        head.transformer_ffn_layers,
        strict=True,
    ):
        attention = _attention(cross.get_submodule("multihead_attn"))
        attended = attention(queries + position_VC, keys_1MC, values_1MC, need_weights=False)[0]
        queries = cross.get_submodule("norm")(queries + attended)
        attention = _attention(own.get_submodule("self_attn"))
        placed = queries + position_VC
        attended = attention(placed, placed, queries, need_weights=False)[0]
        queries = ffn(own.get_submodule("norm")(queries + attended))
    encoded_VC: Tensor = queries[0]
    return encoded_VC
