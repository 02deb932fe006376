"""Clips of a batch side by side on the device: labels padded to one number of objects, pixels in flat tables.

Clips may differ in the sizes of maps and images and in the number of objects, not in the number of frames. What depends
on labels and sizes alone is made on the host, where they are, and sent in two copies.

Shapes: B clips, T frames, N objects of the clip that has most, R stored channels, C = R and coverage, filled up to a
multiple of 8, S pixels of a frame of all clips, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from configs.schema import PaddedArea
from train_head.losses.host_copies import send
from train_head.losses.points import STRIDE, neighbours_of, sampling_area
from train_head.losses.targets import ClipTargets

_ALIGNMENT = 8  # numbers: tensor cores want rows of 16 bytes


def filled(stacked_R: Tensor) -> Tensor:
    """Weights (..., R + 1), with 0 in as many more columns as the channels of a group have: (..., C)."""
    return F.pad(stacked_R, (0, -stacked_R.shape[-1] % _ALIGNMENT))


@dataclass(frozen=True, kw_only=True)
class ClipGroup:
    """Some consecutive clips of a batch, ready to be sampled."""

    clips: slice
    labels_BN: Tensor  # 0 where there is no such object
    table_SC: Tensor  # channels of every pixel of every frame, side by side; the coverage is 1
    first_pixel_BT: Tensor  # of each frame, in the table
    masks: Tensor  # all label masks of all clips, flat, and an empty one of the largest size
    first_mask_BTN: Tensor  # where each begins, that of the empty one where there is no such object
    scales_2B112: Tensor  # of maps and of masks, as `neighbours_of` takes them
    sizes_2B112: Tensor

    @classmethod
    def of(
        cls, clips: slice, maps: Sequence[Tensor], targets: Sequence[ClipTargets], padded_area: PaddedArea
    ) -> ClipGroup:
        """Put these clips of a batch, of which one has an object at least, side by side."""
        maps, targets = maps[clips], targets[clips]
        device, T = maps[0].device, len(maps[0])
        map_hws = [(m.shape[2], m.shape[3]) for m in maps]
        frame_pixels = [0, *accumulate(height * width for height, width in map_hws)]
        first_pixel_BT = np.array(frame_pixels[:-1])[:, None] + np.arange(T) * frame_pixels[-1]
        labels_BN, first_mask_BTN = _padded_labels(targets)
        labels, pixels, first_masks = send([labels_BN, first_pixel_BT, first_mask_BTN], device)
        areas_hw = [sampling_area(t.image_hw, hw, padded_area) for t, hw in zip(targets, map_hws, strict=True)]
        areas_B112 = np.array(areas_hw, dtype=np.float32)[:, None, None, ::-1]
        sizes_2B112 = np.array([map_hws, [t.image_hw for t in targets]], dtype=np.float32)[:, :, None, None, ::-1]
        scales, sizes = send([np.stack([areas_B112 / STRIDE, areas_B112]), sizes_2B112], device)
        return cls(
            clips=clips,
            labels_BN=labels,
            table_SC=_pixel_table(maps),
            first_pixel_BT=pixels,
            masks=_flat_masks(targets),
            first_mask_BTN=first_masks,
            scales_2B112=scales,
            sizes_2B112=sizes,
        )

    def at(self, points_BTP2: Tensor) -> tuple[Tensor, Tensor]:
        """Channels (B, T, P, C) and label values (B, T, N, P) at points of every frame.

        (B, 1, P, 2) are points for all frames of a clip. Labels lie in [0, 1], and are 0 where there is no such object.
        """
        index_2BTP4, share_2BTP4 = neighbours_of(points_BTP2, self.scales_2B112, self.sizes_2B112)
        pixel_BTP4 = index_2BTP4[0] + self.first_pixel_BT[..., None, None]
        channels = F.embedding_bag(
            pixel_BTP4.flatten(0, 2),
            self.table_SC,
            per_sample_weights=share_2BTP4[0].expand(pixel_BTP4.shape).flatten(0, 2),
            mode="sum",
        )
        mask_pixel_BTNP4 = index_2BTP4[1, :, :, None] + self.first_mask_BTN[..., None, None]
        labels_BTNP = (self.masks.take(mask_pixel_BTNP4) * share_2BTP4[1, :, :, None]).sum(dim=-1)
        return channels.view(*pixel_BTP4.shape[:-1], -1), labels_BTNP


def _padded_labels(targets: Sequence[ClipTargets]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels (B, N), 0 in the padding, and where the masks (B, T, N) begin in `_flat_masks`."""
    T = targets[0].present_NT.shape[1]
    labels_BN = np.zeros((len(targets), max(target.num_objects for target in targets)), dtype=np.int64)
    first_BTN = np.full((len(targets), T, labels_BN.shape[1]), sum(target.masks_NThw.numel() for target in targets))
    start = 0
    for labels_N, first_TN, target in zip(labels_BN, first_BTN, targets, strict=True):
        N, size = target.num_objects, target.image_hw[0] * target.image_hw[1]
        labels_N[:N] = target.labels_N
        first_TN[:, :N] = start + size * np.arange(N * T).reshape(N, T).T
        start += size * N * T
    return labels_BN, first_BTN


def _flat_masks(targets: Sequence[ClipTargets]) -> Tensor:
    """All label masks one after the other, and an empty one that is as large as any clip's frame."""
    masks = [target.masks_NThw.flatten() for target in targets]
    return torch.cat([*masks, masks[0].new_zeros(max(math.prod(target.image_hw) for target in targets))])


def _pixel_table(maps: Sequence[Tensor]) -> Tensor:
    """Frame by frame the pixels of all clips, each with its channels side by side, float32: (T·S, C)."""
    joined_TRS = torch.cat([map_TRHW.flatten(2) for map_TRHW in maps], dim=2)
    T, R, S = joined_TRS.shape
    table_TSC = torch.zeros(T, S, R + 1 + -(R + 1) % _ALIGNMENT, device=joined_TRS.device)
    table_TSC[..., :R] = joined_TRS.transpose(1, 2)
    table_TSC[..., R] = 1.0
    return table_TSC.flatten(0, 1)
