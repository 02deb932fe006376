"""Dense pretraining of the demo detector's backbone and pixel decoder, in the place of ImageNet's.

Set prediction teaches features slowly; a class and an offset to the object's centre at every pixel teach them in
minutes. The heads that predict these are thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OFFSET_SCALE = 32.0  # pixels; offsets to the centre are of this order


class DensePretraining(nn.Module):
    """Pixel-level module of Mask2Former + throw-away heads on its mask features and multi-scale maps."""

    def __init__(self, pixel_level: nn.Module, channels: int, num_classes: int, num_scales: int = 3) -> None:
        super().__init__()
        self.pixel_level = pixel_level
        self.num_classes = num_classes
        outputs = num_classes + 1 + 2  # background and the offset (x, y)
        self.heads = nn.ModuleList(nn.Conv2d(channels, outputs, 1) for _ in range(1 + num_scales))

    def forward(self, pixels_BCHW: Tensor, masks: list[Tensor], classes: list[Tensor]) -> Tensor:
        """Return the loss: cross-entropy over all pixels plus L1 of the offsets inside objects, mean over maps."""
        output = self.pixel_level(pixels_BCHW)
        maps = [output.decoder_last_hidden_state, *output.decoder_hidden_states]
        wanted_BHW, offset_B2HW = dense_targets(masks, classes, self.num_classes)
        losses = [
            _dense_loss(head(features), wanted_BHW, offset_B2HW)
            for head, features in zip(self.heads, maps, strict=True)
        ]
        return torch.stack(losses).mean()


def dense_targets(masks: list[Tensor], classes: list[Tensor], background: int) -> tuple[Tensor, Tensor]:
    """Class (B, H, W) and offset to the centre of the visible mask (B, 2, H, W) of every pixel."""
    wanted, offsets = [], []
    for masks_NHW, classes_N in zip(masks, classes, strict=True):
        height, width = masks_NHW.shape[1:]
        wanted_HW = torch.full((height, width), background)
        offset_2HW = torch.zeros(2, height, width)
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        for mask_HW, label in zip(masks_NHW.bool(), classes_N.tolist(), strict=True):
            wanted_HW[mask_HW] = label
            offset_2HW[0, mask_HW] = xs[mask_HW].float().mean() - xs[mask_HW]
            offset_2HW[1, mask_HW] = ys[mask_HW].float().mean() - ys[mask_HW]
        wanted.append(wanted_HW)
        offsets.append(offset_2HW / OFFSET_SCALE)
    return torch.stack(wanted), torch.stack(offsets)


def _dense_loss(predicted_BOHW: Tensor, wanted_BHW: Tensor, offset_B2HW: Tensor) -> Tensor:
    size = predicted_BOHW.shape[-2:]
    wanted = F.interpolate(wanted_BHW[:, None].float(), size, mode="nearest-exact")[:, 0].long()
    offset = F.interpolate(offset_B2HW, size, mode="nearest-exact")
    num_labels = predicted_BOHW.shape[1] - 2
    weights = predicted_BOHW.new_ones(num_labels)
    weights[-1] = 0.2
    inside = (wanted != num_labels - 1)[:, None]
    distance = (predicted_BOHW[:, num_labels:] - offset).abs() * inside
    return F.cross_entropy(predicted_BOHW[:, :num_labels], wanted, weights) + distance.sum() / inside.sum().clamp(min=1)
