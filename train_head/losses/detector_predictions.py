"""What the frozen detector predicts, from its cached queries and its prediction heads (Mask2Former §3).

Shapes: C query channels, K detector categories, E mask embedding size, F map channels, R stored channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cache.heads import DetectorHeads
from train_head.heads.layers import Perceptron
from train_head.heads.mask_folding import MapDecoding, MaskWeights, fold_mask_embeddings


@dataclass(frozen=True, kw_only=True)
class FramePredictions:
    """The detector's predictions for queries of any leading shape."""

    class_logits: Tensor  # (..., K + 1), the last is "no object"
    mask_weights: MaskWeights  # logits on the stored map


class FrozenHeads(nn.Module):
    """The detector's prediction heads, never trained. `heads.arrays` are this module's parameters by name."""

    def __init__(self, heads: DetectorHeads) -> None:
        super().__init__()
        shape = {name: array.shape for name, array in heads.arrays.items()}
        dim = heads.hidden_dim
        embed_dim, map_dim = shape["mask_features.weight"]
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, heads.num_classes + 1)
        self.mask_embed = Perceptron((dim, dim, dim, embed_dim))
        self.mask_features = nn.Linear(map_dim, embed_dim)
        self.load_state_dict({name: torch.tensor(array) for name, array in heads.arrays.items()})
        self.requires_grad_(False)

    def normed(self, frame_queries: Tensor) -> Tensor:
        """Cached queries (..., C) after the detector's `decoder_norm`, float32: what the head takes."""
        normed: Tensor = self.decoder_norm(frame_queries.float())
        return normed

    def predict(self, normed_queries: Tensor, decoding: MapDecoding) -> FramePredictions:
        """Class logits and mask weights of normed queries (..., C)."""
        with torch.autocast(normed_queries.device.type, enabled=False):
            return FramePredictions(
                class_logits=self.class_embed(normed_queries),
                mask_weights=fold_mask_embeddings(
                    self.mask_embed(normed_queries),
                    self.mask_features.weight,
                    self.mask_features.bias,
                    decoding,
                ),
            )
