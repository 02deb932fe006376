"""Random points on masks: where they lie, and what maps, logits and label masks hold there.

Shapes: P points, T frames, M matched objects, N label objects, R stored channels, H×W the stride-4 map,
h×w the label masks (input pixels). A point is (x, y) in [0, 1] of the *sampling area*, an area of the input
that starts at its upper left corner and is given in input pixels. Sampling is bilinear with zeros outside, as
PointRend's `point_sample`, but in pixels: so the map may cover another area than the masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

STRIDE = 4  # input pixels per map pixel

PaddedArea = Literal["ignore", "background"]


def sampling_area(image_hw: tuple[int, int], map_hw: tuple[int, int], padded: PaddedArea) -> tuple[int, int]:
    """Area (height, width), in input pixels, that points are drawn from.

    VITA: the release draws points from the padded canvas too and takes padding as background
    ("background", exact if the map covers the canvas). The cache stores next to nothing of the padding, which
    holds no object either, so by default points lie on the image ("ignore").
    """
    if padded == "ignore":
        return image_hw
    return map_hw[0] * STRIDE, map_hw[1] * STRIDE


def map_grid(points: Tensor, area_hw: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Turn points (..., 2) of the area into `grid_sample` coordinates of a map (-1 … 1 = its outer edges)."""
    scale = points.new_tensor(
        (2.0 * area_hw[1] / (map_hw[1] * STRIDE), 2.0 * area_hw[0] / (map_hw[0] * STRIDE))
    )
    return points * scale - 1.0


def sample_map(map_TRHW: Tensor, points_TP2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Stored channels at points of each frame, and as one more channel how much of a point the map covers.

    The coverage (1 inside, less within half a pixel of the edge) is what the constant of a folded mask
    embedding has to be multiplied with. Returns (T, R + 1, P) float32; (1, P, 2) are points for all frames.
    the same.
    """
    T, _, H, W = map_TRHW.shape
    grid_TP2 = map_grid(points_TP2, area_hw, (H, W))
    channels_TRP = F.grid_sample(
        map_TRHW.float(), grid_TP2.expand(T, -1, -1)[:, None], align_corners=False
    ).squeeze(2)
    ones = channels_TRP.new_ones(len(grid_TP2), 1, H, W)
    coverage = F.grid_sample(ones, grid_TP2[:, None], align_corners=False).squeeze(2)
    return torch.cat([channels_TRP, coverage.expand(T, -1, -1)], dim=1)


def sample_logits(logits_GHW: Tensor, points_GP2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Logits (G, P) of G stride-4 maps, each at its own points."""
    grid_GP2 = map_grid(points_GP2, area_hw, (logits_GHW.shape[-2], logits_GHW.shape[-1]))
    return F.grid_sample(logits_GHW[:, None], grid_GP2[:, None], align_corners=False)[:, 0, 0]


def sample_masks(masks_Ghw: Tensor, index_S: Tensor, points_SP2: Tensor, area_hw: tuple[int, int]) -> Tensor:
    """Label values (S, P) in [0, 1] of S chosen masks, each at its own points; zero outside of the mask.

    Only the four neighbours of each point are read: masks stay uint8 or bool, unpadded, and are never copied
    per prediction. `points_SP2` may be (1, P, 2) for all.
    """
    h, w = masks_Ghw.shape[-2:]
    scale = points_SP2.new_tensor((float(area_hw[1]), float(area_hw[0])))
    pixel_SP2 = points_SP2 * scale - 0.5
    corner_SP2 = pixel_SP2.floor()
    fraction_x, fraction_y = (pixel_SP2 - corner_SP2).unbind(-1)
    x, y = corner_SP2.long().unbind(-1)
    flat, start_S1 = masks_Ghw.reshape(-1), (index_S * (h * w))[:, None]
    values = fraction_x.new_zeros(len(index_S), points_SP2.shape[1])
    for dx, weight_x in ((0, 1 - fraction_x), (1, fraction_x)):
        for dy, weight_y in ((0, 1 - fraction_y), (1, fraction_y)):
            inside = (x + dx >= 0) & (x + dx < w) & (y + dy >= 0) & (y + dy < h)
            pixel = (y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1)
            values += flat[start_S1 + pixel] * (weight_x * weight_y * inside)
    return values


class PointSource(Protocol):
    """Where the losses take their points from."""

    def matching_points(self, device: torch.device) -> Tensor:
        """Points (P, 2) shared by all queries and frames of a clip."""
        ...

    def loss_points(self, logits_GHW: Tensor, area_hw: tuple[int, int]) -> Tensor:
        """Points (G, P, 2) for G matched logit maps, one map per object and frame."""
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
    def for_step(cls, config: PointConfig, seed: int, step: int, device: torch.device) -> RandomPoints:
        """Points that depend on (seed, step) only, so that a resumed run draws the same ones."""
        state = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
        return cls(config, torch.Generator(device).manual_seed(state))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=self.generator, device=self.generator.device)

    def matching_points(self, device: torch.device) -> Tensor:
        """Uniform points (P, 2)."""
        return self._uniform(self.config.matching).to(device)

    @torch.no_grad()
    def loss_points(self, logits_GHW: Tensor, area_hw: tuple[int, int]) -> Tensor:
        """The most uncertain of many uniform candidates plus some uniform points: (G, P, 2).

        Works through the maps in groups, so that the candidates of all maps never exist at once.
        """
        config = self.config
        num_candidates = int(config.loss * config.oversample)
        num_fresh = config.loss - int(config.loss * config.uncertain)
        group = max(1, (1 << 23) // num_candidates)
        chosen = [logits_GHW.new_empty(0, config.loss, 2)]
        for logits in torch.split(logits_GHW, group):
            candidates = self._uniform(len(logits), num_candidates).to(logits.device)
            fresh = self._uniform(len(logits), num_fresh).to(logits.device)
            chosen.append(keep_uncertain(logits, candidates, fresh, area_hw, config.loss - num_fresh))
        return torch.cat(chosen)


def keep_uncertain(
    logits_GHW: Tensor, candidates_GS2: Tensor, fresh_GF2: Tensor, area_hw: tuple[int, int], keep: int
) -> Tensor:
    """The `keep` candidates whose logits are nearest to zero, then the fresh points: (G, keep + F, 2)."""
    distance_GS = sample_logits(logits_GHW, candidates_GS2, area_hw).abs()
    nearest_GK = distance_GS.topk(keep, dim=1, largest=False, sorted=False).indices
    return torch.cat([candidates_GS2.gather(1, nearest_GK[..., None].expand(-1, -1, 2)), fresh_GF2], dim=1)
