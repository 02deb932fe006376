"""Where a config's splits lie: labels and frames on disk, features in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.errors import AnnotationError
from cache.labels.annotations import load_labels
from cache.labels.tracks import Labels
from configs.schema import Settings


@dataclass(frozen=True, kw_only=True)
class SplitPaths:
    """One label file with its frames and its cache."""

    name: str
    labels: Path
    frames: Path
    features: Path

    def read_labels(self) -> Labels:
        """The label file. Raises AnnotationError, naming the settings where there is none."""
        if not self.labels.is_file():
            hint = f"check data.root and data.{self.name}_labels; `make doctor` lists what a config looks for"
            raise AnnotationError("no such label file", where=self.labels, hint=hint)
        return load_labels(self.labels)


def train_split(settings: Settings) -> SplitPaths:
    """Return the paths of the train split (which also holds the hold-out videos)."""
    data = settings.data
    return _split(settings, "train", data.train_labels, data.train_frames)


def valid_split(settings: Settings) -> SplitPaths | None:
    """Return the paths of the validation split, or None where the config names none."""
    data = settings.data
    if data.valid_labels is None or data.valid_frames is None:
        return None
    return _split(settings, "valid", data.valid_labels, data.valid_frames)


def pseudo_split(settings: Settings) -> SplitPaths | None:
    """Return the paths of the pseudo-videos (labels and frames are those of the images), None without them."""
    pseudo = settings.pseudo
    if pseudo.ratio == 0 or pseudo.labels is None or pseudo.images is None:
        return None
    return _split(settings, "pseudo", pseudo.labels, pseudo.images)


def all_splits(settings: Settings) -> list[SplitPaths]:
    """Return every split of videos that the config names."""
    valid = valid_split(settings)
    return [train_split(settings)] + ([] if valid is None else [valid])


def all_caches(settings: Settings) -> list[SplitPaths]:
    """Return every split of videos, and the pseudo-videos where the config has them."""
    pseudo = pseudo_split(settings)
    return [*all_splits(settings), *([] if pseudo is None else [pseudo])]


def _split(settings: Settings, name: str, labels: str, frames: str) -> SplitPaths:
    root = Path(settings.data.root)
    return SplitPaths(name=name, labels=root / labels, frames=root / frames, features=Path(settings.cache.path) / name)
