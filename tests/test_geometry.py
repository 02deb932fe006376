"""Transforms of labels against a loop over pixels, against the transformed image, and worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cache.media.geometry import Transform, TransformRanges


def naive(mask: NDArray[Any], transform: Transform) -> NDArray[Any]:
    """Every output pixel's centre carried back through rotation, mirror, resize and crop, one after another."""
    top, left, crop_h, crop_w = transform.crop
    height, width = transform.size
    result = np.zeros((height, width), mask.dtype)
    angle = math.radians(transform.rotation)
    for row in range(height):
        for column in range(width):
            up, right = height / 2 - (row + 0.5), (column + 0.5) - width / 2
            # Where it was before it was turned counter-clockwise by `angle`: turned clockwise.
            x = width / 2 + right * math.cos(angle) + up * math.sin(angle)
            y = height / 2 - (up * math.cos(angle) - right * math.sin(angle))
            x = width - x if transform.flip else x
            source_x, source_y = math.floor(x * crop_w / width), math.floor(y * crop_h / height)
            if 0 <= source_x < crop_w and 0 <= source_y < crop_h:
                result[row, column] = mask[top + source_y, left + source_x]
    return result


def random_mask(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)


TRANSFORMS = [
    Transform(crop=(0, 0, 12, 17), size=(12, 17)),
    Transform(crop=(0, 0, 12, 17), size=(12, 17), flip=True),
    Transform(crop=(2, 3, 9, 11), size=(9, 11)),
    Transform(crop=(2, 3, 9, 11), size=(7, 20), flip=True),
    Transform(crop=(0, 0, 12, 17), size=(31, 5)),
    Transform(crop=(0, 0, 12, 17), size=(12, 17), rotation=13.0),
    Transform(crop=(1, 4, 10, 12), size=(15, 16), flip=True, rotation=-14.5),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.name)
def test_masks_are_those_of_a_loop_over_pixels(transform: Transform) -> None:
    mask = random_mask(12, 17)
    expected = naive(mask, transform)
    np.testing.assert_array_equal(transform.on_mask(mask), expected)
    np.testing.assert_array_equal(transform.on_mask(np.stack([mask, 1 - mask]))[0], expected)


@pytest.mark.parametrize("rotation", [0.0, 15.0, -9.0])
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_and_labels_go_the_same_way(flip: bool, rotation: float) -> None:
    mask = np.zeros((80, 100), np.uint8)
    mask[20:50, 15:40] = 1
    mask[40:70, 60:66] = 1
    transform = Transform(crop=(5, 3, 70, 90), size=(105, 120), flip=flip, rotation=rotation)
    image = np.asarray(transform.on_image(Image.fromarray(mask * 255)))
    assert image.shape == transform.size
    moved = transform.on_mask(mask)
    assert moved.sum() > 500
    assert ((image > 127) != moved.astype(bool)).sum() < 0.01 * moved.size  # the outlines, where bilinear is between
    assert (image[moved == 0] < 200).all() and (image[moved == 1] > 55).all()


def test_hand_worked_labels() -> None:
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0]])
    assert Transform(crop=(0, 0, 2, 4), size=(2, 4), flip=True).on_mask(mask).tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert Transform(crop=(0, 1, 2, 2), size=(2, 4)).on_mask(mask).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert Transform(crop=(0, 0, 2, 2), size=(2, 2), rotation=90).on_mask(mask).tolist() == [[0, 1], [1, 0]]
    quarter = Transform(crop=(0, 0, 2, 4), size=(2, 4), rotation=180).on_mask(mask)
    assert quarter.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_drawn_transforms_stay_inside_and_in_range() -> None:
    ranges = TransformRanges(rotation=15.0)
    seen_flips, seen_edges, seen_angles = set(), set(), []
    for seed in range(60):
        original_hw = ((480, 640), (640, 427), (300, 300))[seed % 3]
        transforms = ranges.draw(np.random.default_rng(seed), original_hw, 4)
        assert transforms == ranges.draw(np.random.default_rng(seed), original_hw, 4)
        assert len({transform.size for transform in transforms}) == 1
        for transform in transforms:
            top, left, height, width = transform.crop
            assert min(top, left) >= 0 and top + height <= original_hw[0] and left + width <= original_hw[1]
            # Thought of at 400, 500 or 600, the sides of the crop are 384 to 600, or those of a smaller image.
            shown = [edge / min(original_hw) * min(height, width) for edge in (400, 500, 600)]
            assert any(382 <= side <= 602 for side in shown)
            assert abs(height / width - transform.size[0] / transform.size[1]) < 0.02
            seen_angles.append(transform.rotation)
        seen_flips.add(transforms[0].flip)
        seen_edges.add(min(transforms[0].size))
    assert seen_flips == {False, True}
    assert seen_edges <= set(ranges.short_edges) and len(seen_edges) == 8
    assert -15 <= min(seen_angles) < -10 and 10 < max(seen_angles) <= 15
