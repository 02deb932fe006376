"""Stored planes of block frequencies become channels at pixels, on the computing device.

The same as `Planes.expand` (cache/codecs/blocks.py), which says what planes are, without a product for any of the
many planes that are not stored.

Shapes: T frames, N planes, R stored numbers of a block, K channels, F = 64 frequencies or pixels of a block, H×W the
map, h×w its blocks; of a group: G channels, n planes of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cache.codecs.blocks import BLOCK, FREQUENCIES, Planes, cosines
from cache.codecs.digits import DIGIT

_GROUP = 16  # channels: their pixels fit a CPU's cache


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that are computed at once."""

    channels: slice
    plane_Gn: Tensor  # int64: rows of the stored planes; N, a row of zeros, where a channel has fewer than n
    pixels_GFn: Tensor  # what a plane adds to each pixel of a block

    @classmethod
    def of(cls, planes: Planes, channels: range) -> ChannelGroup:
        """The group of some channels, on the CPU."""
        channel_N, frequency_N = np.divmod(planes.number_N, FREQUENCIES)
        own = [np.flatnonzero(channel_N == channel) for channel in channels]
        plane_Gn = np.full((len(own), max(map(len, own))), len(channel_N))
        for row, found in zip(plane_Gn, own, strict=True):
            row[: len(found)] = found
        frequency_Gn = np.append(frequency_N, 0)[plane_Gn]
        pixels_GnF = cosines().astype(np.float32)[frequency_Gn]
        return cls(
            channels=slice(channels.start, channels.stop),
            plane_Gn=torch.from_numpy(plane_Gn),
            pixels_GFn=torch.from_numpy(pixels_GnF).transpose(1, 2).contiguous(),
        )

    def to(self, device: torch.device) -> ChannelGroup:
        """Copy to a device."""
        return replace(self, plane_Gn=self.plane_Gn.to(device), pixels_GFn=self.pixels_GFn.to(device))


@dataclass(frozen=True, kw_only=True)
class MapPlanes:
    """Which coefficients are stored, and how they become pixels."""

    planes: Planes
    groups: tuple[ChannelGroup, ...]

    @classmethod
    def on(cls, device: torch.device, planes: Planes) -> MapPlanes:
        """On CUDA all channels at once: a launch costs more than products with zeros."""
        K = planes.num_channels
        size = K if device.type == "cuda" else _GROUP
        ranges = [range(start, min(start + size, K)) for start in range(0, K, size)]
        return cls(planes=planes, groups=tuple(ChannelGroup.of(planes, channels).to(device) for channels in ranges))

    @torch.no_grad()
    def expand(self, stored_TRhw: Tensor, map_hw: tuple[int, int]) -> Tensor:
        """(T, R, h, w) int8 -> (T, K, H, W) float32: half precision could not hold two digits."""
        T, _, h, w = stored_TRhw.shape
        H, W = map_hw
        maps_TKHW = stored_TRhw.new_empty(T, self.planes.num_channels, H, W, dtype=torch.float32)
        step = T if stored_TRhw.is_cuda else 1
        for frames in (slice(start, start + step) for start in range(0, T, step)):
            values_TNS = self._values(stored_TRhw[frames].flatten(2))
            for group in self.groups:
                chosen_TGnS = values_TNS[:, group.plane_Gn]
                blocks = (group.pixels_GFn @ chosen_TGnS).unflatten(3, (h, w)).unflatten(2, (BLOCK, BLOCK))
                rows = blocks.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
                maps_TKHW[frames, group.channels] = rows[..., :H, :W]
        return maps_TKHW

    def _values(self, stored_TRS: Tensor) -> Tensor:
        """The planes as whole numbers in float32, and a row of zeros: (T, N + 1, S)."""
        (T, _, S), N, P = stored_TRS.shape, len(self.planes.number_N), self.planes.num_wide
        values_TNS = stored_TRS.new_zeros(T, N + 1, S, dtype=torch.float32)
        values_TNS[:, :N] = stored_TRS[:, :N]
        values_TNS[:, :P] += DIGIT * stored_TRS[:, N:].float()
        return values_TNS
