"""Geometric transforms that take pixels and labels along: crop, resize, mirror, rotate.

The views of a video, the frames of a pseudo-video and the augmentation of fine-tuning are each one `Transform`. Its
masks and its pixels agree: a mask's output pixel is the input pixel that its centre comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache.layout import Size, VideoAttributes

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""
MAX_EDGE = 1333  # detectron2's cap on the longer edge of a test image


def network_size(original_hw: Size, short_edge: int | None) -> Size:
    """Return the (height, width) that the detector sees: detectron2's ResizeShortestEdge, rounding included."""
    if short_edge is None:
        return original_hw
    height, width = original_hw
    scale = short_edge / min(height, width)
    new_height, new_width = (short_edge, scale * width) if height < width else (scale * height, short_edge)
    if max(new_height, new_width) > MAX_EDGE:
        shrink = MAX_EDGE / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return int(new_height + 0.5), int(new_width + 0.5)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Crop, resize to `size`, mirror, and rotate about the middle, in this order."""

    crop: Box
    """Of the input, inside its borders."""
    size: Size
    """(height, width) of the output."""
    flip: bool = False
    """Mirrored left to right."""
    rotation: float = 0.0
    """Degrees counter-clockwise. What turns in from outside the crop is black, and no object."""

    @classmethod
    def resize(cls, original_hw: Size, size: Size) -> Transform:
        """The whole frame at another size."""
        return cls(crop=(0, 0, *original_hw), size=size)

    @property
    def name(self) -> str:
        """All that it does, in words such as `crop0x16x360x600-size216x360-flip-rotate7.5`."""
        parts = ["crop" + "x".join(map(str, self.crop)), "size" + "x".join(map(str, self.size))]
        parts += ["flip"] if self.flip else []
        return "-".join([*parts, *([f"rotate{self.rotation:g}"] if self.rotation else [])])

    def on_image(self, image: Image.Image) -> Image.Image:
        """Transform pixels: Pillow's bilinear resizing (as detectron2) and rotation."""
        top, left, height, width = self.crop
        if (top, left, width, height) != (0, 0, *image.size):
            image = image.crop((left, top, left + width, top + height))
        if image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.rotate(self.rotation, Image.Resampling.BILINEAR) if self.rotation else image

    def on_mask(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Transform masks (..., h, w) to (..., height, width) of `size`: nearest, 0 where nothing was."""
        if (0, 0, *mask.shape[-2:]) == self.crop and self.size == self.crop[2:] and not self.flip and not self.rotation:
            return mask
        ys, xs = self._sources()
        top, left, height, width = self.crop
        if not self.rotation:
            columns = np.swapaxes(mask, -1, -2)  # as a decoded mask lies in memory: five times faster
            taken: NDArray[Any] = np.take(np.take(columns, left + xs[0], axis=-2), top + ys[:, 0], axis=-1)
            return np.swapaxes(taken, -1, -2)
        inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
        rows, columns = top + np.clip(ys, 0, height - 1), left + np.clip(xs, 0, width - 1)
        return np.where(inside, mask[..., rows, columns], np.zeros((), mask.dtype))

    def _sources(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pixel (y, x) of the crop under every output pixel's centre: (h, 1) and (1, w), or (h, w) if rotated."""
        (out_h, out_w), (height, width) = self.size, self.crop[2:]
        ys, xs = np.arange(out_h)[:, None] + 0.5, np.arange(out_w)[None] + 0.5
        if self.rotation:
            cos, sin = np.cos(np.radians(self.rotation)), np.sin(np.radians(self.rotation))
            dy, dx = ys - out_h / 2, xs - out_w / 2
            ys, xs = out_h / 2 + sin * dx + cos * dy, out_w / 2 + cos * dx - sin * dy
        if self.flip:
            xs = out_w - xs
        return np.floor(ys * height / out_h).astype(np.int64), np.floor(xs * width / out_w).astype(np.int64)


def transform_of(attributes: VideoAttributes) -> Transform:
    """What leads from a video's frames on disk to the network input that a cache holds the features of."""
    view = attributes.view
    return Transform(crop=view.crop or (0, 0, *attributes.original_hw), size=attributes.image_hw, flip=view.flip)


@dataclass(frozen=True, kw_only=True)
class TransformRanges:
    """What random transforms are drawn from (VITA's pseudo-videos, arXiv 2206.04403, section 4); lengths in pixels.

    A frame is thought of at one of the shorter edges `resize_edges`, where the crop has its sides within
    `crop_sides`; the crop is resized to one of the shorter edges `short_edges`.
    """

    resize_edges: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    short_edges: tuple[int, ...] = (288, 320, 352, 384, 416, 448, 480, 512)
    rotation: float = 0.0
    """Largest angle to either side, in degrees."""
    flip: bool = True
    """Whether one in two is mirrored."""

    def draw(self, rng: np.random.Generator, original_hw: Size, num_frames: int) -> tuple[Transform, ...]:
        """One transform a frame, for frames that become one video: zoom, place and angle are each frame's own.

        A clip whose frames move together takes the one transform of `num_frames=1`.
        VITA: the release draws size, shape and mirroring for each frame too, and pads the frames to one size.
        """
        zooms = rng.choice(self.resize_edges, num_frames) / min(original_hw)
        height, width = (self._draw_side(rng, edge * float(zooms.min())) for edge in original_hw)
        size = network_size((height, width), int(rng.choice(self.short_edges)))
        flip = bool(rng.random() < 0.5) and self.flip
        return tuple(
            Transform(
                crop=_draw_box(rng, original_hw, (height / zoom, width / zoom)),
                size=size,
                flip=flip,
                rotation=round(float(rng.uniform(-self.rotation, self.rotation)), 2),
            )
            for zoom in zooms.tolist()
        )

    def _draw_side(self, rng: np.random.Generator, edge: float) -> int:
        longest = int(edge + 0.5)
        low, high = (min(side, longest) for side in self.crop_sides)
        return int(rng.integers(low, high + 1))


def _draw_box(rng: np.random.Generator, original_hw: Size, wanted_hw: tuple[float, float]) -> Box:
    """A box of about the wanted size, anywhere inside the frame."""
    height, width = (min(max(1, round(want)), edge) for want, edge in zip(wanted_hw, original_hw, strict=True))
    top, left = int(rng.integers(original_hw[0] - height + 1)), int(rng.integers(original_hw[1] - width + 1))
    return top, left, height, width
