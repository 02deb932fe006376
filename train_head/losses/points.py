"""Random points on masks: where they lie, and what maps, logits and label masks hold there.

Shapes: P points, T frames, M matched objects, N label objects, R stored channels, H×W the stride-4 map,
h×w the label masks (input pixels). A point is (x, y) in [0, 1] of the *sampling area*, an area of the input
that starts at its upper left corner and is given in input pixels. Sampling is bilinear with zeros outside, as
PointRend's `point_sample`, but in pixels: so the map may cover another area than the masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import PaddedArea
from train_head.draws import StepDraw
from train_head.losses.selection import smallest

STRIDE = 4  # input pixels per map pixel
_MASK_PIXELS_AT_ONCE = 1 << 20


def sampling_area(image_hw: tuple[int, int], map_hw: tuple[int, int], padded: PaddedArea) -> tuple[int, int]:
    """Area (height, width), in input pixels, that points are drawn from.

    VITA: the release draws points from the padded canvas too and takes padding as background
    ("background", exact if the map covers the canvas). The cache stores next to nothing of the padding, which
    holds no object either, so by default points lie on the image ("ignore").
    """
    if padded is PaddedArea.ignore:
        return image_hw
    return map_hw[0] * STRIDE, map_hw[1] * STRIDE


def _grid(points: Tensor, area_hw: tuple[int, int], extent_hw: tuple[int, int]) -> Tensor:
    """Turn points (..., P, 2) of the area into `grid_sample` coordinates of what covers `extent_hw` pixels."""
    scale = _constants(points, 2.0 * area_hw[1] / extent_hw[1], 2.0 * area_hw[0] / extent_hw[0])
    # A row of all P pairs: broadcasting along two elements at a time cannot use vectors.
    scaled = points.flatten(-2) * scale.repeat(points.shape[-2])
    return scaled.sub_(1.0).view(points.shape)


def _constants(like: Tensor, *values: float) -> Tensor:
    """Numbers as a tensor, filled in on its device: a copy from the host would wait for all that runs there."""
    result = like.new_empty(len(values))
    for index, value in enumerate(values):
        result[index].fill_(value)
    return result


def sample_map(map_TRHW: Tensor, points_TP2: Tensor, area_hw: tuple[int, int]) -> Iterator[Tensor]:
    """Stored channels at points of each frame, and as one more channel how much of a point the map covers.

    The coverage (1 inside, less within half a pixel of the edge) is what the constant of a folded mask
    embedding has to be multiplied with. Yields T of (P, R + 1) float32; (1, P, 2) are points for all frames.
    A pixel's channels are put side by side, in one table that every frame overwrites, and read at once, which on CPU
    is 7 times faster than `grid_sample`.
    """
    T, R, H, W = map_TRHW.shape
    index_TP4, share_TP4 = (part.expand(T, -1, -1) for part in map_neighbours(points_TP2, area_hw, (H, W)))
    pixels_SR = torch.empty(H * W, R + 1, device=map_TRHW.device)
    pixels_SR[:, R] = 1.0
    for map_RHW, index_P4, share_P4 in zip(map_TRHW, index_TP4, share_TP4, strict=True):
        pixels_SR[:, :R] = map_RHW.flatten(1).t()
        yield F.embedding_bag(index_P4, pixels_SR, per_sample_weights=share_P4, mode="sum")


def map_neighbours(points: Tensor, area_hw: tuple[int, int], map_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels of a stride-4 map around points of the sampling area, and their shares; see `neighbours_of`."""
    scale_2 = _constants(points, area_hw[1] / STRIDE, area_hw[0] / STRIDE)
    return neighbours_of(points, scale_2, _constants(points, map_hw[1], map_hw[0]))


def neighbours_of(points: Tensor, scale: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (..., 4) around points (..., 2) as numbers y·W + x, and their bilinear shares, 0 outside of the image.

    `scale`: the sampling area's (width, height) in the image's pixels; `size`: the image's (W, H); both float.
    """
    # The two axes lie one after the other in memory, not in turns: pairs of numbers cannot use vectors.
    ndim = max(points.ndim, scale.ndim)
    points, scale, size = (_axes_first(values, ndim) for values in (points, scale, size))
    centres = points.contiguous() * scale - 0.5
    corner = centres.floor()
    fraction = centres - corner
    shares, pixels = torch.stack([1 - fraction, fraction]), torch.stack([corner, corner + 1])
    shares = shares * ((pixels >= 0) & (pixels < size))
    x, y = pixels.clamp_min(0).minimum(size - 1).long().unbind(dim=1)
    share_x, share_y = shares.unbind(dim=1)
    return _corners_last((y * size[0].long())[:, None] + x), _corners_last(share_y[:, None] * share_x)


def _axes_first(values: Tensor, ndim: int) -> Tensor:
    return values.reshape(*(1,) * (ndim - values.ndim), *values.shape).movedim(-1, 0)


def _corners_last(values: Tensor) -> Tensor:
    return values.flatten(0, 1).movedim(0, -1).contiguous()


def sample_masks(masks_Ghw: Tensor, index_S: Tensor, points_SP2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Label values (S, P) in [0, 1] of S chosen masks, each at its own points; zero outside of the mask.

    Masks stay uint8 or bool and unpadded; a few at a time become floats, in a buffer that fits a CPU's cache
    (`grid_sample` is then several times faster than gathering the four neighbours of each point).
    `points_SP2` may be (1, P, 2) for all.
    """
    h, w = masks_Ghw.shape[-2:]
    grid_SP2 = _grid(points_SP2, area_hw, (h, w)).expand(len(index_S), -1, -1)
    values = [grid_SP2.new_empty(0, points_SP2.shape[1])]
    group = max(1, _MASK_PIXELS_AT_ONCE // (h * w))
    for index, grid in zip(torch.split(index_S, group), torch.split(grid_SP2, group), strict=True):
        masks = masks_Ghw.index_select(0, index)[:, None].to(grid.dtype)
        values.append(F.grid_sample(masks, grid[:, None], align_corners=False)[:, 0, 0])
    return torch.cat(values)


@dataclass(frozen=True, kw_only=True)
class LossPoints:
    """What the masks of a frame choose their points from, for G frames: the first `num_candidates` of S points are
    candidates, of which a mask takes the `keep` most uncertain; it takes all that follow.
    """

    points_GS2: Tensor
    num_candidates: int
    keep: int


class PointSource(Protocol):
    """Where the losses of one clip take their points from."""

    def matching_points(self, device: torch.device) -> Tensor:
        """Points (P, 2) shared by all queries and frames of a clip."""
        ...

    def loss_points(self, count: int, device: torch.device) -> LossPoints:
        """Points of `count` frames, each for all masks of its frame."""
        ...


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    """How many points are drawn. The paper has one number; fewer `matching` points are cheaper."""

    matching: int = 12544
    loss: int = 12544
    oversample: float = 3.0  # candidates per point that is kept
    uncertain: float = 0.75  # share of the points that are the most uncertain candidates


class RandomPoints:
    """Uniform points for the matching, mostly uncertain ones for the losses (PointRend, Mask2Former §3.3)."""

    def __init__(self, config: PointConfig, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator

    @classmethod
    def for_clip(
        cls, config: PointConfig, seed: int, index: int, device: torch.device, draw: StepDraw = StepDraw.clip_points
    ) -> RandomPoints:
        """Points of clip `index` of a run: they depend on (seed, index, draw) only.

        So a resumed run draws the same ones, and so does any number of processes that share a batch.
        """
        state = int(np.random.SeedSequence([seed, index, draw]).generate_state(1, np.uint64)[0] >> 1)
        return cls(config, torch.Generator(device).manual_seed(state))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=self.generator, device=self.generator.device)

    def matching_points(self, device: torch.device) -> Tensor:
        """Uniform points (P, 2)."""
        return self._uniform(self.config.matching).to(device)

    def loss_points(self, count: int, device: torch.device) -> LossPoints:
        """Many uniform candidates of every frame, and some uniform points more.

        VITA: the release draws candidates for every mask anew; here masks of a frame choose among the same ones, which
        leaves every mask's loss what it is in expectation and was a fifteenth of a step on CPU.
        """
        config = self.config
        keep = int(config.loss * config.uncertain)
        candidates = int(config.loss * config.oversample)
        points_GS2 = self._uniform(count, candidates + config.loss - keep).to(device)
        return LossPoints(points_GS2=points_GS2, num_candidates=candidates, keep=keep)


@torch.no_grad()
def choose_uncertain(logits_GS: Tensor, num_candidates: int, keep: int) -> Tensor:
    """Which of S points each mask takes: the `keep` most uncertain candidates, and all that follow: (..., G, P)."""
    fresh_F = torch.arange(num_candidates, logits_GS.shape[-1], device=logits_GS.device)
    fresh_GF = fresh_F.expand(*logits_GS.shape[:-1], -1)
    if keep == 0:
        return fresh_GF
    distance_GS = logits_GS[..., :num_candidates].abs()
    if distance_GS.is_cuda:
        kept_GK = distance_GS.topk(keep, largest=False, sorted=False).indices
    else:
        kept = smallest(distance_GS.flatten(0, -2).numpy(), keep)
        kept_GK = torch.from_numpy(kept).view(*distance_GS.shape[:-1], keep)
    return torch.cat([kept_GK, fresh_GF], dim=-1)
