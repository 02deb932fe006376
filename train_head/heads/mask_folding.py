"""Mask logits straight from the stored map, without decompressing it.

Shapes: T frames, C map channels, R channels of the codec's space, E mask embedding size. A map z in that space, which
is what is stored or what stored blocks expand to, stands for the FPN map m = decode · z + mean; a 1×1 convolution
(A, b) and an embedding e give the logit

    e · (A m + b) = (decodeᵀ Aᵀ e) · z + e · (A mean + b)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train_head.heads.map_planes import MapPlanes
from train_head.products import product


@dataclass(frozen=True, kw_only=True)
class MapDecoding:
    """How the codec's space stands for map channels; None is the identity and zero (an uncompressed map)."""

    matrix_CR: Tensor | None = None
    mean_C: Tensor | None = None
    planes: MapPlanes | None = None

    def expand(self, stored_TRhw: Tensor, map_hw: tuple[int, int]) -> Tensor:
        """What is stored -> maps (T, R, H, W) in the codec's space: float32 out of blocks, else unchanged."""
        return stored_TRhw if self.planes is None else self.planes.expand(stored_TRhw, map_hw)

    def to(self, device: torch.device) -> MapDecoding:
        """Copy to a device."""
        return MapDecoding(
            matrix_CR=None if self.matrix_CR is None else self.matrix_CR.to(device),
            mean_C=None if self.mean_C is None else self.mean_C.to(device),
            planes=None if self.planes is None else MapPlanes.on(device, self.planes.planes),
        )


@dataclass(frozen=True, kw_only=True)
class MaskWeights:
    """Linear maps from stored channels to logits: logit = weights · z + const, float32."""

    weights_R: Tensor  # (..., R)
    const: Tensor  # (...)

    def stacked(self) -> Tensor:
        """The weights with the constant as one more channel: (..., R + 1)."""
        return torch.cat([self.weights_R, self.const[..., None]], dim=-1)

    def logits(self, map_TRHW: Tensor) -> Tensor:
        """Dense logits, to infer: (T, M, H, W) of M weights (M, R), or (T, M, R), on a stored map of any type."""
        T, _, H, W = map_TRHW.shape
        weights_TMR, const_TM = self.weights_R.expand(T, -1, -1), self.const.expand(T, -1)
        if map_TRHW.is_cuda:
            pixels_TRS = map_TRHW.flatten(2).to(weights_TMR.dtype)
            logits_TMS = product(weights_TMR, pixels_TRS.mT) + const_TM[..., None]
        else:
            frames = zip(map_TRHW, weights_TMR, const_TM, strict=True)
            logits_TMS = torch.stack([self._frame_logits(*frame) for frame in frames])
        return torch.unflatten(logits_TMS, -1, (H, W))

    @staticmethod
    def _frame_logits(map_RHW: Tensor, weights_MR: Tensor, const_M: Tensor) -> Tensor:
        """Logits (M, H·W) of one frame: frame by frame, no second copy of the whole map ever exists."""
        return product(weights_MR, map_RHW.flatten(1).to(weights_MR.dtype).t()) + const_M[:, None]


def fold_mask_embeddings(
    mask_embed: Tensor, conv_weight_EC: Tensor, conv_bias_E: Tensor, decoding: MapDecoding
) -> MaskWeights:
    """Fold the convolution and the codec into embeddings (..., E). Always float32, also under autocast."""
    with torch.autocast(mask_embed.device.type, enabled=False):
        embed, matrix, bias = mask_embed.float(), conv_weight_EC.float(), conv_bias_E.float()
        if decoding.mean_C is not None:
            bias = bias + matrix @ decoding.mean_C.float()
        if decoding.matrix_CR is not None:
            matrix = matrix @ decoding.matrix_CR.float()
        return MaskWeights(weights_R=embed @ matrix, const=embed @ bias)
