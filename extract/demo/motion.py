"""How the demo's shapes move: paths (T, 2) in pixels for one frame size."""

from __future__ import annotations

import numpy as np

from extract.demo.shapes import Floats


def drift(rng: np.random.Generator, image_hw: tuple[int, int], num_frames: int) -> Floats:
    """Wander at 1-3 pixels a frame, bouncing off the borders."""
    size = np.array([image_hw[1], image_hw[0]], dtype=float)
    heading = rng.uniform(0, 2 * np.pi)
    velocity = rng.uniform(1.0, 3.0) * np.array([np.cos(heading), np.sin(heading)])
    steps = np.arange(num_frames)[:, None]
    wobble = rng.uniform(0, 4) * np.sin(steps * rng.uniform(0.2, 0.5) + rng.uniform(0, 6, 2))
    straight = rng.uniform(0.1, 0.9, 2) * size + steps * velocity + wobble
    folded = np.mod(straight, 2 * size)  # a triangle wave: reflection without a loop
    return np.asarray(np.where(folded > size, 2 * size - folded, folded))


def crossing(rng: np.random.Generator, image_hw: tuple[int, int], num_frames: int) -> tuple[Floats, Floats]:
    """Two paths that meet in one point at one moment: whoever is in front hides the other."""
    height, width = image_hw
    meeting = np.array([width, height]) * rng.uniform(0.35, 0.65, 2)
    moment = num_frames * rng.uniform(0.35, 0.65)
    steps = (np.arange(num_frames) - moment)[:, None]
    heading = rng.uniform(0, 2 * np.pi)
    opening = np.pi + rng.uniform(-0.9, 0.9)
    reach = 0.45 * min(image_hw) * rng.uniform(0.8, 1.3) / moment
    first = np.array([np.cos(heading), np.sin(heading)])
    second = np.array([np.cos(heading + opening), np.sin(heading + opening)])
    return meeting + steps * reach * first, meeting + steps * reach * second


def excursion(
    rng: np.random.Generator, image_hw: tuple[int, int], num_frames: int, radius: float, absence: tuple[int, int]
) -> Floats:
    """Leave the frame before frame `absence[0]` and come back, elsewhere, after frame `absence[1]`."""
    height, width = image_hw
    leave, back = absence
    margin = 1.5 * radius
    side = float(rng.choice([-1.0, 1.0]))
    exit_x = width + margin if side > 0 else -margin
    entry_x = exit_x if rng.random() < 0.5 else width - exit_x
    inside = rng.uniform(0.25, 0.75, (2, 2)) * (width, height)
    times = np.array([0, leave, back, num_frames - 1])
    xs = np.interp(np.arange(num_frames), times, [inside[0, 0], exit_x, entry_x, inside[1, 0]])
    ys = np.interp(np.arange(num_frames), times, [inside[0, 1], inside[0, 1], inside[1, 1], inside[1, 1]])
    return np.stack([xs, ys], axis=1)
