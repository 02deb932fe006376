"""Which videos train, and a hold-out split by video for data sets whose validation labels are not public."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace

from cache.errors import AnnotationError, ConfigError
from cache.labels.tracks import Labels

_RULE = "held out: sha256('{seed}:' + folder of the video) / 2**256 < {fraction}; at least one video on each side"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Video ids to train on and to hold out, in file order, and the rule that drew them."""

    train_ids: tuple[int, ...]
    holdout_ids: tuple[int, ...]
    rule: str
    skipped_ids: tuple[int, ...] = ()
    """Of videos that are on neither side, since extraction could not read them."""
    holdout_folders: frozenset[str] = frozenset()
    """Of what is held out, in whichever cache: another data set, or another size, may have its own ids."""

    @classmethod
    def undivided(cls, labels: Labels) -> Split:
        """Nothing is held out."""
        return cls(train_ids=tuple(labels.video_by_id), holdout_ids=(), rule="none held out")

    def without(self, skipped_ids: Collection[int]) -> Split:
        """The same split, where these videos are on neither side."""
        return replace(
            self,
            train_ids=tuple(each for each in self.train_ids if each not in skipped_ids),
            holdout_ids=tuple(each for each in self.holdout_ids if each not in skipped_ids),
            skipped_ids=tuple(skipped_ids),
        )

    def to_json(self) -> dict[str, object]:
        """What is written down beside a run."""
        skipped = {"skipped_ids": list(self.skipped_ids)} if self.skipped_ids else {}
        return {
            "rule": self.rule,
            "train_ids": list(self.train_ids),
            "holdout_ids": list(self.holdout_ids),
            **skipped,
        }


def holdout_split(labels: Labels, fraction: float, seed: int) -> Split:
    """Hold out about `fraction` (0 < fraction < 1) of the videos, decided by each video's folder alone.

    So the split depends on no order, no video moves when others are added, and videos that share a folder
    stay together. Only where one side would be empty, the folder nearest to the threshold joins it.
    Raises ConfigError for an impossible fraction, AnnotationError where there are no two folders.
    """
    if not 0 < fraction < 1:
        raise ConfigError("the hold-out fraction is impossible", expected="0 < fraction < 1", got=fraction)
    draws = {video.name: _draw(video.name, seed) for video in labels.videos}
    if len(draws) < 2:
        folders = f"{len(labels.videos)} videos in {len(draws)} folders"
        raise AnnotationError("nothing to hold out", expected="videos in two folders or more", got=folders)
    by_draw = sorted(draws, key=draws.__getitem__)
    num_held_out = sum(draw < fraction for draw in draws.values())
    held_out = set(by_draw[: min(max(num_held_out, 1), len(draws) - 1)])
    return Split(
        train_ids=tuple(video.id for video in labels.videos if video.name not in held_out),
        holdout_ids=tuple(video.id for video in labels.videos if video.name in held_out),
        rule=_RULE.format(seed=seed, fraction=fraction),
        holdout_folders=frozenset(held_out),
    )


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1] that depends on the name and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()) / 2**256
