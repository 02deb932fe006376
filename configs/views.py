"""The views that a config declares, for one video: where stage one writes them and stage two looks for them."""

from __future__ import annotations

import numpy as np

from cache.labels.tracks import Video
from cache.layout import View
from configs.schema import Settings, ViewSettings


def train_views(settings: Settings, video: Video) -> tuple[View, ...]:
    """The video itself, then its declared views."""
    return View(), *(_view(declared, video) for declared in settings.data.views)


def _view(declared: ViewSettings, video: Video) -> View:
    crop = None
    if declared.crop < 1:
        height, width = (max(1, round(declared.crop * edge)) for edge in (video.height, video.width))
        rng = np.random.default_rng([declared.crop_seed, *str(video.id).encode()])
        top, left = int(rng.integers(video.height - height + 1)), int(rng.integers(video.width - width + 1))
        crop = (top, left, height, width)
    return View(crop=crop, short_edge=declared.short_edge, flip=declared.flip)
