"""Textured shapes on textured backgrounds: the renderer shared by the demo's videos and still images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

VIDEO_CATEGORIES = ("circle", "square", "triangle", "star", "cross", "ring", "arrow", "moon")
# The detector's world overlaps only in part with the videos', as COCO does with YouTube-VIS:
# ring, arrow and moon are new to it, and it knows two shapes that no video has.
DETECTOR_CATEGORIES = ("circle", "square", "triangle", "star", "cross", "heart", "ell")

_SUPERSAMPLE = 3

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """One shape in one frame; sizes and positions in pixels, angles in radians."""

    category: str
    center_xy: tuple[float, float]
    radius: float
    angle: float
    stretch: float
    texture: Floats  # (size, size, 3) in 0..255, glued to the shape

    def outline(self) -> list[Floats]:
        """Return the polygons (n, 2) in image coordinates: the outer one first, then holes."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        to_image = np.array([[cos, -sin], [sin, cos]]) * self.radius
        stretch = np.array([self.stretch, 1.0 / self.stretch])
        return [(polygon * stretch) @ to_image.T + self.center_xy for polygon in _unit_outline(self.category)]


def _ring_points(count: int, radius: float = 1.0, phase: float = 0.0) -> Floats:
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False) + phase
    return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _star() -> Floats:
    points = np.empty((10, 2))
    points[0::2] = _ring_points(5)
    points[1::2] = _ring_points(5, 0.45, np.pi / 5)
    return points


def _moon() -> Floats:
    outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 32)
    inner = np.linspace(1.75 * np.pi, 0.25 * np.pi, 32)
    far = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    near = np.stack([0.45 + 0.77 * np.cos(inner), 0.77 * np.sin(inner)], axis=1)
    return np.concatenate([far, near[4:-4]])


def _heart() -> Floats:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 17.0


def _unit_outline(category: str) -> list[Floats]:
    bar = 0.36  # half the width of the cross's bars
    half_cross = np.array([[-bar, -1], [bar, -1], [bar, -bar], [1, -bar], [1, bar], [bar, bar]])
    outlines: dict[str, list[Floats]] = {
        "circle": [_ring_points(40, 0.95)],
        "square": [_ring_points(4, 1.15, np.pi / 4)],
        "triangle": [_ring_points(3, 1.15)],
        "star": [_star() * 1.15],
        "cross": [np.concatenate([half_cross, -half_cross])],
        "ring": [_ring_points(40), _ring_points(40, 0.48)],
        "arrow": [
            np.array(
                [[0, -1.15], [0.85, -0.1], [0.32, -0.1], [0.32, 1.05], [-0.32, 1.05], [-0.32, -0.1], [-0.85, -0.1]]
            )
        ],
        "moon": [_moon() * 1.05],
        "heart": [_heart()],
        "ell": [np.array([[-0.7, -1.1], [-0.1, -1.1], [-0.1, 0.5], [0.9, 0.5], [0.9, 1.1], [-0.7, 1.1]])],
    }
    return outlines[category]


def silhouette(sprite: Sprite, image_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterise the full (amodal) mask of a sprite as (h, w) booleans; off-frame parts are cut."""
    height, width = image_hw
    canvas = Image.new("1", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for index, polygon in enumerate(sprite.outline()):
        draw.polygon([(float(x), float(y)) for x, y in polygon * _SUPERSAMPLE], fill=int(index == 0))
    blocks = np.asarray(canvas, dtype=np.uint8).reshape(height, _SUPERSAMPLE, width, _SUPERSAMPLE)
    return np.asarray(blocks.sum(axis=(1, 3)) * 2 > _SUPERSAMPLE**2)


def render(
    background: Floats, sprites: list[Sprite], noise: np.random.Generator, noise_std: float = 4.0
) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """Paint sprites back to front.

    Returns the RGB image (h, w, 3) and, per sprite, its visible mask (h, w).
    """
    height, width = background.shape[:2]
    image = background.copy()
    masks: list[NDArray[np.bool_]] = []
    for sprite in sprites:
        mask = silhouette(sprite, (height, width))
        masks = [below & ~mask for below in masks]
        masks.append(mask)
        ys, xs = np.nonzero(mask)
        image[ys, xs] = _texture_at(sprite, xs, ys)
    image += noise.normal(0.0, noise_std, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), masks


def _texture_at(sprite: Sprite, xs: NDArray[np.int64], ys: NDArray[np.int64]) -> Floats:
    """Look up the texture in the shape's own frame, so that it turns and grows with the shape."""
    cos, sin = np.cos(sprite.angle), np.sin(sprite.angle)
    dx, dy = xs - sprite.center_xy[0], ys - sprite.center_xy[1]
    size = sprite.texture.shape[0]
    u = (cos * dx + sin * dy) / (sprite.radius * sprite.stretch)
    v = (-sin * dx + cos * dy) / (sprite.radius / sprite.stretch)
    column = np.clip(((u + 1.3) / 2.6 * size).astype(int), 0, size - 1)
    row = np.clip(((v + 1.3) / 2.6 * size).astype(int), 0, size - 1)
    return np.asarray(sprite.texture[row, column])


def smooth_noise(rng: np.random.Generator, image_hw: tuple[int, int], cells: int, amplitude: float) -> Floats:
    """Band-limited colour noise (h, w, 3) around zero, `cells` blobs along the shorter edge."""
    height, width = image_hw
    rows, columns = max(2, cells * height // min(image_hw)), max(2, cells * width // min(image_hw))
    coarse = rng.normal(0.0, 1.0, (rows, columns, 3)).astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(coarse[..., c], mode="F").resize((width, height), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return np.asarray(np.stack(planes, axis=-1) * amplitude, dtype=np.float64)


def random_background(rng: np.random.Generator, image_hw: tuple[int, int]) -> Floats:
    """Draw a textured background (h, w, 3)."""
    base = rng.uniform(50, 200, 3)
    return np.asarray(base + smooth_noise(rng, image_hw, 3, 22.0) + smooth_noise(rng, image_hw, 14, 10.0))


def random_texture(rng: np.random.Generator, background: Floats, size: int = 48) -> Floats:
    """Draw a shape's texture (size, size, 3): one colour, stripes or blobs; colour says nothing of category."""
    base = rng.uniform(20, 235, 3)
    while np.linalg.norm(base - background.mean(axis=(0, 1))) < 70:  # visible, if not always striking
        base = rng.uniform(20, 235, 3)
    texture = np.broadcast_to(base, (size, size, 3)) + smooth_noise(rng, (size, size), 5, 12.0)
    if rng.random() < 0.4:
        wave = np.sin(np.arange(size) * rng.uniform(0.35, 0.8) + rng.uniform(0, 6))
        texture = texture + (wave > 0)[None, :, None] * rng.uniform(-55, 55, 3)
    return np.asarray(np.clip(texture, 0, 255))
