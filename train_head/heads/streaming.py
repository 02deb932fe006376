"""The head over a video of any length, block by block: the numbers of `VitaHead.predict` in constant memory.

Encoder: every layer attends as soon as a group of frames is complete and lets the others wait, so frames flow through
all layers with a delay and nothing is computed twice. Decoder: every layer reads the encoded frames once and sums its
attention block by block. Only full attention (window 0) has every frame see every other: its time grows with T².

Shapes: T frames, t frames of a block, q tokens of a frame, V video queries, C channels, N passes (1), S queries and
M keys of an attention, H attention heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train_head.heads.contract import VideoOutputs
from train_head.heads.frame_spill import HELD_BYTES, FrameSpill, TokenBlock, require_space
from train_head.heads.layers import (
    CrossAttentionLayer,
    FeedForwardLayer,
    MultiheadAttention,
    SelfAttentionLayer,
    window_runs,
)

if TYPE_CHECKING:
    from train_head.heads.vita import VitaHead


@torch.no_grad()
def predict_stream(
    head: VitaHead, blocks: Iterable[TokenBlock], num_frames: int, held_bytes: int = HELD_BYTES
) -> VideoOutputs:
    """Whole-video outputs from blocks of normed frame queries, `num_frames` in all.

    Equals `VitaHead.predict` up to rounding, whatever the blocks. Frames may have fewer tokens than slots. Beyond
    `held_bytes` the encoded frames (4·C·q bytes each) go to a temporary file: CacheError where it has no room.
    """
    with FrameSpill(held_bytes) as encoded:
        for block in _encode(head, blocks, num_frames, held_bytes):
            encoded.add(block)
        return head.read_out(_decode(head, encoded))


def _encode(head: VitaHead, blocks: Iterable[TokenBlock], num_frames: int, held_bytes: int) -> Iterator[TokenBlock]:
    """Encoded frames, in order; blocks come out as large as groups of frames get complete."""
    window, shift = head.config.window, head.shifts(num_frames)
    blocks = _projected(head, blocks, num_frames, held_bytes)
    for index, layer in enumerate(zip(head.enc_self_attn, head.enc_ffn, strict=True)):
        attention, ffn = layer
        assert isinstance(attention, SelfAttentionLayer) and isinstance(ffn, FeedForwardLayer)
        if window:
            blocks = _attend_in_windows(attention, ffn, blocks, num_frames, window, shift and index % 2 == 1)
        else:
            blocks = _attend_to_all(attention, ffn, blocks, held_bytes)
    yield from blocks


def _projected(head: VitaHead, blocks: Iterable[TokenBlock], num_frames: int, held_bytes: int) -> Iterator[TokenBlock]:
    for index, block in enumerate(blocks):
        if index == 0:
            require_space(num_frames * block.slots_tq.shape[1] * head.config.hidden_dim * 4, held_bytes)
        yield TokenBlock(tokens_tqC=head.input_proj_dec(block.tokens_tqC), slots_tq=block.slots_tq)


def _attend_in_windows(
    attention: SelfAttentionLayer,
    ffn: FeedForwardLayer,
    blocks: Iterable[TokenBlock],
    num_frames: int,
    window: int,
    shifted: bool,
) -> Iterator[TokenBlock]:
    """One encoder layer. The groups are those of `window_runs`: at most a window of frames waits."""
    tokens_tqC, slots_tq = None, None
    left = num_frames
    for block in blocks:
        tokens_tqC = block.tokens_tqC if tokens_tqC is None else torch.cat([tokens_tqC, block.tokens_tqC])
        slots_tq = block.slots_tq if slots_tq is None else torch.cat([slots_tq, block.slots_tq])
        first = window // 2 if shifted else 0
        ready = first + (len(tokens_tqC) - first) // window * window  # below `first` frames: negative or zero
        if len(tokens_tqC) == left:
            ready = left
        if ready <= 0:
            continue
        runs = window_runs(ready, window, shifted)
        encoded_1tqC = ffn(attention.forward_runs(tokens_tqC[None, :ready], runs))
        yield TokenBlock(tokens_tqC=encoded_1tqC[0], slots_tq=slots_tq[:ready])
        tokens_tqC, slots_tq = tokens_tqC[ready:].clone(), slots_tq[ready:]
        left, shifted = left - ready, False
    assert left == 0, f"{left} of {num_frames} frames never came"


def _attend_to_all(
    attention: SelfAttentionLayer, ffn: FeedForwardLayer, blocks: Iterable[TokenBlock], held_bytes: int
) -> Iterator[TokenBlock]:
    """One encoder layer of full attention: every block of frames meets every other."""
    own = attention.self_attn
    with FrameSpill(held_bytes) as frames:
        for block in blocks:
            frames.add(block)
        for block in frames:
            tokens_1SC = block.tokens_tqC.flatten(0, 1)[None]
            sums = BlockwiseAttention(own, own.project(tokens_1SC, 0))
            for other in frames:
                sums.add(*own.project(other.tokens_tqC.flatten(0, 1)[None], 1, 2).chunk(2, dim=-1))
            attended_tqC = attention.norm(tokens_1SC + own.out_proj(sums.result())).view(block.tokens_tqC.shape)
            yield TokenBlock(tokens_tqC=ffn(attended_tqC), slots_tq=block.slots_tq)


def _decode(head: VitaHead, encoded: FrameSpill) -> Tensor:
    """Video queries (V, C) after the last decoder layer, before `decoder_norm`."""
    position_VC, queries_1VC = head.query_embed.weight, head.query_feat.weight[None]
    for cross, own, ffn in zip(
        head.transformer_cross_attention_layers,
        head.transformer_self_attention_layers,
        head.transformer_ffn_layers,
        strict=True,
    ):
        assert isinstance(cross, CrossAttentionLayer)
        attention = cross.multihead_attn
        sums = BlockwiseAttention(attention, attention.project(queries_1VC + position_VC, 0))
        for block in encoded:
            keys_tqC = block.tokens_tqC + head.fq_pos.weight[block.slots_tq]
            sums.add(
                attention.project(keys_tqC.flatten(0, 1)[None], 1),
                attention.project(block.tokens_tqC.flatten(0, 1)[None], 2),
            )
        queries_1VC = ffn(own(cross.norm(queries_1VC + attention.out_proj(sums.result())), position_VC))
    return queries_1VC[0]


class BlockwiseAttention:
    """Softmax attention of S queries, summed over blocks of keys as they come.

    Remembers the largest score so far, the sum of the exponentials and the weighted sum of the values, and rescales
    both sums whenever a larger score appears: the sums are those of all keys at once (Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018).
    """

    def __init__(self, attention: MultiheadAttention, query_NSC: Tensor) -> None:
        self._num_heads = attention.num_heads
        query_NHSc = self._split(query_NSC)
        self._query_NHSc = query_NHSc / query_NHSc.shape[-1] ** 0.5
        self._largest_NHS1 = torch.full_like(query_NHSc[..., :1], -torch.inf)
        self._total_NHS1 = torch.zeros_like(self._largest_NHS1)
        self._weighted_NHSc = torch.zeros_like(query_NHSc)

    def _split(self, tokens_NSC: Tensor) -> Tensor:
        return torch.unflatten(tokens_NSC, -1, (self._num_heads, -1)).transpose(1, 2)

    def add(self, key_NMC: Tensor, value_NMC: Tensor) -> None:
        """Take M more keys and values, projected."""
        scores_NHSM = self._query_NHSc @ self._split(key_NMC).transpose(-1, -2)
        largest_NHS1 = torch.maximum(self._largest_NHS1, scores_NHSM.amax(dim=-1, keepdim=True))
        weights_NHSM = (scores_NHSM - largest_NHS1).exp_()
        fade_NHS1 = (self._largest_NHS1 - largest_NHS1).exp()
        self._total_NHS1 = self._total_NHS1 * fade_NHS1 + weights_NHSM.sum(dim=-1, keepdim=True)
        self._weighted_NHSc = self._weighted_NHSc * fade_NHS1 + weights_NHSM @ self._split(value_NMC)
        self._largest_NHS1 = largest_NHS1

    def result(self) -> Tensor:
        """Attention to all keys so far, before the output projection: (N, S, C)."""
        return (self._weighted_NHSc / self._total_NHS1).transpose(1, 2).flatten(2)
