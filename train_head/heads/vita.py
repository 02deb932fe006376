"""The VITA head: associates the frame queries of a whole clip or video (VITA §3).

Shapes: B clips, T frames, Q frame queries, V video queries, C channels, L detector layers, D decoder layers,
K categories, N independent passes (L·B in training, 1 in inference). Frame queries are the detector's, after
its `decoder_norm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from train_head.heads.contract import HeadConfig, HeadOutputs, TrackHead, VideoOutputs, mask_feature_layer
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.layers import (
    CrossAttentionLayer,
    FeedForwardLayer,
    Perceptron,
    SelfAttentionLayer,
    window_runs,
)
from train_head.heads.streaming import predict_stream
from train_head.products import Linear


class VitaHead(TrackHead):
    """Encoder over frame queries, decoder of video queries, class / mask / similarity heads."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        dim, heads, ffn = config.hidden_dim, config.num_heads, config.ffn_dim
        depth = range(config.dec_layers)
        self.enc_self_attn = nn.ModuleList(SelfAttentionLayer(dim, heads) for _ in range(config.enc_layers))
        self.enc_ffn = nn.ModuleList(FeedForwardLayer(dim, ffn) for _ in range(config.enc_layers))
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(dim, heads) for _ in depth)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(dim, heads) for _ in depth)
        self.transformer_ffn_layers = nn.ModuleList(FeedForwardLayer(dim, ffn) for _ in depth)
        self.vita_mask_features = mask_feature_layer(config)
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(config.num_queries, dim)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.fq_pos = nn.Embedding(config.num_frame_queries, dim)
        self.input_proj_dec = Linear(config.detector_dim, dim)
        self.class_embed = Linear(dim, config.num_classes + 1)
        self.mask_embed = Perceptron((dim, dim, dim, config.mask_dim))
        if config.use_sim:
            self.sim_embed_frame = Linear(dim, dim)
            self.sim_embed_clip = Linear(dim, dim)

    def forward(self, frame_queries_LBTQC: Tensor) -> HeadOutputs:
        """Training outputs of B clips; every detector layer is an independent pass."""
        L, B = frame_queries_LBTQC.shape[:2]
        encoded_NTQC = self.encode(frame_queries_LBTQC.flatten(0, 1), self.config.shift_in_training)
        queries_DNVC = self.decoder_norm(torch.stack(self.decode(encoded_NTQC)))
        queries_DLBVC = torch.unflatten(queries_DNVC, 1, (L, B))
        similar = self.config.use_sim
        return HeadOutputs(
            class_logits_DLBVK=self.class_embed(queries_DLBVC),
            mask_embed_DLBVC=self.mask_embed(queries_DLBVC),
            video_queries_DLBVC=queries_DLBVC,
            clip_similarity_LBVC=self.sim_embed_clip(queries_DLBVC[-1]) if similar else None,
            frame_similarity_LBTQC=torch.unflatten(self.sim_embed_frame(encoded_NTQC), 0, (L, B)) if similar else None,
        )

    def predict(self, frame_queries_TQC: Tensor) -> VideoOutputs:
        """Whole-video outputs: shifted windows and last layers only, as the release infers; at once."""
        encoded_NTQC = self.encode(frame_queries_TQC[None], self.shifts(len(frame_queries_TQC)))
        return self.read_out(self.decode(encoded_NTQC)[-1][0])

    def predict_stream(self, blocks: Iterable[TokenBlock], num_frames: int) -> VideoOutputs:
        """The same in constant memory (`streaming.predict_stream`)."""
        return predict_stream(self, blocks, num_frames)

    def shifts(self, num_frames: int) -> bool:
        """Whether windows shift in a video of T frames."""
        return self.config.shift_short_videos or num_frames > self.config.window

    def read_out(self, queries_VC: Tensor) -> VideoOutputs:
        """Class logits and mask embeddings of the last decoder layer's video queries."""
        queries_VC = self.decoder_norm(queries_VC)
        return VideoOutputs(class_logits_VK=self.class_embed(queries_VC), mask_embed_VC=self.mask_embed(queries_VC))

    def encode(self, frame_queries_NTQC: Tensor, shift: bool) -> Tensor:
        """Window attention among frame queries: (N, T, Q, C). With `shift`, odd layers shift."""
        encoded = self.input_proj_dec(frame_queries_NTQC)
        num_frames, window = encoded.shape[1], self.config.window
        for index, (attention, ffn) in enumerate(zip(self.enc_self_attn, self.enc_ffn, strict=True)):
            assert isinstance(attention, SelfAttentionLayer)
            runs = window_runs(num_frames, window, shifted=shift and index % 2 == 1)
            encoded = ffn(attention.forward_runs(encoded, runs))
        assert isinstance(encoded, Tensor)
        return encoded

    def decode(self, encoded_NTQC: Tensor) -> list[Tensor]:
        """Video queries (N, V, C) after each of the D decoder layers, before `decoder_norm`."""
        values_NMC = encoded_NTQC.flatten(1, 2)
        keys_NMC = (encoded_NTQC + self.fq_pos.weight).flatten(1, 2)
        position_VC = self.query_embed.weight
        queries_NVC = self.query_feat.weight.expand(len(encoded_NTQC), -1, -1)
        outputs = []
        for cross, own, ffn in zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        ):
            queries_NVC = ffn(own(cross(queries_NVC, position_VC, keys_NMC, values_NMC), position_VC))
            outputs.append(queries_NVC)
        return outputs


RELEASE_PREFIX = "vita_module."


def strip_release_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the head's entries of a released checkpoint, under the names of `VitaHead.state_dict`."""
    return {
        name.removeprefix(RELEASE_PREFIX): tensor for name, tensor in state.items() if name.startswith(RELEASE_PREFIX)
    }
