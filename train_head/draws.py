"""What random numbers are drawn for: each purpose has a number in its seeds, so that none depends on another."""

from __future__ import annotations

from enum import IntEnum


class ClipDraw(IntEnum):
    """Which clip, and how it looks: seeds are (run's seed, purpose, number of the epoch or clip)."""

    videos = 0  # order of the first source's videos in an epoch
    frames = 1
    view = 2  # of a cached video; in fine-tuning the augmentation
    mixed_videos = 3  # order of another source's


class StepDraw(IntEnum):
    """What a training step does with a clip: seeds are (run's seed, clip number, purpose)."""

    clip_points = 0
    frame_points = 1
    dropped_paths = 3  # of a backbone with stochastic depth
