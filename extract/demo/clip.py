"""A generated clip as a video file, to try `make predict` on: seconds that no head has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache.media.video_writer import VideoWriter
from extract.demo.shapes import random_background, render
from extract.demo.videos import FRAME_SIZES, make_actors

RATE = 10.0  # frames a second


def write_clip(path: Path, *, seed: int, num_frames: int = 36) -> None:
    """Write an .mp4 of moving shapes; the same seed gives the same pictures."""
    rng = np.random.default_rng([3, seed])  # the data set's splits are 1 and 2
    background = random_background(rng, FRAME_SIZES[0])
    actors = make_actors(rng, background, num_frames)
    with VideoWriter(path, FRAME_SIZES[0]) as writer:
        for frame in range(num_frames):
            image, _ = render(background, [actor.at(frame) for actor in actors], rng)
            writer.add(image, frame / RATE)
