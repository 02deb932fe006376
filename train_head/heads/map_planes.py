"""Stored planes of block frequencies become channels at pixels, on the computing device.

The same as `Planes.expand` (cache/codecs/blocks.py), which says what planes are, without a product for any of the
many planes that are not stored.

Shapes: T frames, N planes, R stored numbers of a block, K channels, F = 64 frequencies or pixels of a block, H×W the
map, h×w its blocks, S those of all frames; of a group: G channels, n planes of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cache.codecs.blocks import BLOCK, FREQUENCIES, Planes, cosines
from cache.codecs.digits import DIGIT

_GROUP = 16  # channels
_PIXELS = 1 << 18  # of a group and some frames: what fits a CPU's cache


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that are computed at once."""

    channels: slice
    plane_Gn: Tensor  # int64: rows of the stored planes; N, a row of zeros, where a channel has fewer than n
    pixels_GnF: Tensor  # what a plane adds to each pixel of a block

    @classmethod
    def of(cls, planes: Planes, channels: range) -> ChannelGroup:
        """The group of some channels, on the CPU."""
        channel_N, frequency_N = np.divmod(planes.number_N, FREQUENCIES)
        own = [np.flatnonzero(channel_N == channel) for channel in channels]
        plane_Gn = np.full((len(own), max(1, *map(len, own))), len(channel_N))
        for row, found in zip(plane_Gn, own, strict=True):
            row[: len(found)] = found
        frequency_Gn = np.append(frequency_N, 0)[plane_Gn]
        return cls(
            channels=slice(channels.start, channels.stop),
            plane_Gn=torch.from_numpy(plane_Gn),
            pixels_GnF=torch.from_numpy(cosines().astype(np.float32)[frequency_Gn]),
        )

    def to(self, device: torch.device) -> ChannelGroup:
        """Copy to a device."""
        return replace(self, plane_Gn=self.plane_Gn.to(device), pixels_GnF=self.pixels_GnF.to(device))


@dataclass(frozen=True, kw_only=True)
class MapPlanes:
    """Which coefficients are stored, and how they become pixels."""

    planes: Planes
    groups: tuple[ChannelGroup, ...]
    at_once: bool
    """All frames of a clip together, whatever their size."""

    @classmethod
    def on(cls, device: torch.device, planes: Planes, *, at_once: bool | None = None) -> MapPlanes:
        """By default all channels and frames at once on CUDA, where a launch costs more than products with zeros."""
        at_once = device.type == "cuda" if at_once is None else at_once
        K = planes.num_channels
        size = K if at_once else _GROUP
        ranges = [range(start, min(start + size, K)) for start in range(0, K, size)]
        groups = tuple(ChannelGroup.of(planes, channels).to(device) for channels in ranges)
        return cls(planes=planes, groups=groups, at_once=at_once)

    @torch.no_grad()
    def expand(self, stored_TRhw: Tensor, map_hw: tuple[int, int]) -> Tensor:
        """(T, R, h, w) int8 -> (T, K, H, W) float32: half precision could not hold two digits."""
        T, _, h, w = stored_TRhw.shape
        whole_TKhw = stored_TRhw.new_empty(T, self.planes.num_channels, h * BLOCK, w * BLOCK, dtype=torch.float32)
        blocks_TKhuwv = whole_TKhw.view(T, -1, h, BLOCK, w, BLOCK)
        step = T if self.at_once else max(1, _PIXELS // (_GROUP * h * w * FREQUENCIES))
        for frames in (slice(start, start + step) for start in range(0, T, step)):
            values_NS = self._values(stored_TRhw[frames])
            for group in self.groups:
                G, n = group.plane_Gn.shape
                chosen_GnS = values_NS.index_select(0, group.plane_Gn.flatten()).view(G, n, -1)
                pixels_GSF = chosen_GnS.mT @ group.pixels_GnF
                pixels_GThwuv = pixels_GSF.view(G, -1, h, w, BLOCK, BLOCK)
                blocks_TKhuwv[frames, group.channels] = pixels_GThwuv.permute(1, 0, 2, 4, 3, 5)
        cut = whole_TKhw[..., : map_hw[0], : map_hw[1]]
        return cut if map_hw[1] == w * BLOCK else cut.contiguous()  # a frame's channel is one piece of memory

    def _values(self, stored_TRhw: Tensor) -> Tensor:
        """The planes of some frames as whole numbers in float32, and a row of zeros: (N + 1, T·h·w)."""
        N, P = len(self.planes.number_N), self.planes.num_wide
        stored_RS = stored_TRhw.transpose(0, 1).flatten(1)
        values_NS = stored_RS.new_zeros(N + 1, stored_RS.shape[1], dtype=torch.float32)
        values_NS[:N] = stored_RS[:N]
        values_NS[:P] += DIGIT * stored_RS[N:].float()
        return values_NS
