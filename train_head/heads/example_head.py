"""A second head in a page, to start your own from: tracks are states of a GRU that reads the video frame by frame.

In every frame each track attends to the detector's queries, then to the other tracks, and its state takes up what it
read (one transformer layer and one GRU cell, the same in all frames). So tracks are propagated online, as in DVIS
(Zhang et al., ICCV 2023, referring tracker) or GenVIS (Heo et al., CVPR 2023), but trained from VITA's losses; the
mean of a track's states is its video query.

Shapes: see `contract.py`; N independent passes (L·B in training, 1 in inference).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train_head.heads.contract import HeadConfig, HeadOutputs, TrackHead, VideoOutputs, mask_feature_layer
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.layers import CrossAttentionLayer, FeedForwardLayer, Perceptron, SelfAttentionLayer
from train_head.products import Linear


class GruHead(TrackHead):
    """One recurrent layer over frames, class / mask / similarity heads; any number of tokens a frame."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        dim = config.hidden_dim
        self.input_proj = Linear(config.detector_dim, dim)
        self.first_state = nn.Embedding(config.num_queries, dim)
        self.track_embed = nn.Embedding(config.num_queries, dim)  # tells tracks apart, in every frame
        self.read = CrossAttentionLayer(dim, config.num_heads)
        self.compare = SelfAttentionLayer(dim, config.num_heads)
        self.ffn = FeedForwardLayer(dim, config.ffn_dim)
        self.update = nn.GRUCell(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_embed = Linear(dim, config.num_classes + 1)
        self.mask_embed = Perceptron((dim, dim, dim, config.mask_dim))
        if config.use_sim:
            self.sim_embed_frame, self.sim_embed_clip = Linear(dim, dim), Linear(dim, dim)
        self.vita_mask_features = mask_feature_layer(config)

    def follow(self, state_NVC: Tensor, tokens_NQC: Tensor) -> Tensor:
        """States after one more frame, whose tokens are projected."""
        track_VC = self.track_embed.weight
        read_NVC = self.ffn(self.compare(self.read(state_NVC, track_VC, tokens_NQC, tokens_NQC), track_VC))
        state: Tensor = self.update(read_NVC.flatten(0, 1), state_NVC.flatten(0, 1))
        return state.view_as(state_NVC)

    def forward(self, frame_queries_LBTQC: Tensor) -> HeadOutputs:
        """Training outputs of B clips, as one "decoder layer" (D = 1)."""
        tokens_LBTQC = self.input_proj(frame_queries_LBTQC)
        L, B = tokens_LBTQC.shape[:2]
        states = [self.first_state.weight.expand(L * B, -1, -1)]
        for tokens_NQC in tokens_LBTQC.flatten(0, 1).unbind(dim=1):
            states.append(self.follow(states[-1], tokens_NQC))
        queries_LBVC = self.norm(torch.stack(states[1:]).mean(dim=0)).unflatten(0, (L, B))
        return HeadOutputs(
            class_logits_DLBVK=self.class_embed(queries_LBVC)[None],
            mask_embed_DLBVC=self.mask_embed(queries_LBVC)[None],
            video_queries_DLBVC=queries_LBVC[None],
            clip_similarity_LBVC=self.sim_embed_clip(queries_LBVC) if self.config.use_sim else None,
            frame_similarity_LBTQC=self.sim_embed_frame(tokens_LBTQC) if self.config.use_sim else None,
        )

    @torch.no_grad()
    def predict_stream(self, blocks: Iterable[TokenBlock], num_frames: int) -> VideoOutputs:
        """Outputs for one video: states and their sum are all that is kept of the frames before."""
        state_1VC = self.first_state.weight[None]
        sum_1VC = torch.zeros_like(state_1VC)
        for block in blocks:
            for tokens_qC in self.input_proj(block.tokens_tqC):
                state_1VC = self.follow(state_1VC, tokens_qC[None])
                sum_1VC = sum_1VC + state_1VC
        queries_VC = self.norm(sum_1VC[0] / num_frames)
        return VideoOutputs(class_logits_VK=self.class_embed(queries_VC), mask_embed_VC=self.mask_embed(queries_VC))
