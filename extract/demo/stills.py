"""Seeded still images with instance masks: all that the demo's detector ever sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from extract.demo.shapes import DETECTOR_CATEGORIES, Floats, Sprite, random_background, random_texture, render


@dataclass(frozen=True, kw_only=True)
class Still:
    """An image (h, w, 3) uint8 with N visible masks (N, h, w) and classes (N) into DETECTOR_CATEGORIES."""

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    classes: NDArray[np.int64]


def make_still(seed: int, image_hw: tuple[int, int]) -> Still:
    """Draw still number `seed`: 1-6 shapes, in one image in two a pair that nearly covers each other."""
    rng = np.random.default_rng([7, seed])
    background = random_background(rng, image_hw)
    sprites = [_random_sprite(rng, background) for _ in range(rng.integers(1, 7))]
    if len(sprites) > 1 and rng.random() < 0.5:
        x, y = np.array(sprites[0].center_xy) + rng.normal(0, 0.8, 2) * sprites[0].radius
        sprites[1] = replace(sprites[1], center_xy=(float(x), float(y)))
    if len(sprites) > 1 and rng.random() < 0.3:  # look-alikes
        sprites[-1] = replace(sprites[-1], category=sprites[0].category, texture=sprites[0].texture)
    image, masks = render(background, sprites, rng)
    keep = [index for index, mask in enumerate(masks) if mask.sum() >= 20]
    return Still(
        image=image,
        masks=np.stack([masks[i] for i in keep]) if keep else np.zeros((0, *image_hw), dtype=bool),
        classes=np.array([DETECTOR_CATEGORIES.index(sprites[i].category) for i in keep], dtype=np.int64),
    )


def _random_sprite(rng: np.random.Generator, background: Floats) -> Sprite:
    height, width = background.shape[:2]
    return Sprite(
        category=str(rng.choice(DETECTOR_CATEGORIES)),
        center_xy=(float(rng.uniform(-4, width + 4)), float(rng.uniform(-4, height + 4))),
        radius=float(rng.uniform(8, 27)),
        angle=float(rng.uniform(0, 2 * np.pi)),
        stretch=float(np.exp(rng.uniform(-0.18, 0.18))),
        texture=random_texture(rng, background),
    )
