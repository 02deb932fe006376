"""From a config to caches, labels and video ids: what stage two trains on and what it is evaluated on."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cache.codecs import Codec
from cache.errors import AnnotationError, CacheError, ConfigError, FingerprintMismatch, IncompleteVideo, shown, some
from cache.labels.splits import Split, holdout_split
from cache.labels.tracks import Labels
from cache.layout import ANNOTATIONS, SKIPPED, video_group_name
from cache.preload import require_memory
from cache.progress import warn_once
from cache.reader import FeatureCache
from cache.upkeep.staging import local_copy
from configs.changes import in_yaml
from configs.command import device_name
from configs.schema import CodecName, Settings
from configs.schema import Split as SplitName
from configs.splits import SplitPaths, pseudo_split, train_split, valid_split
from configs.views import train_views
from train_head.data.clip_loader import num_workers
from train_head.data.clips import ClipSource


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """Some videos of one cache, with the labels that the cache carries."""

    split: str
    feature_cache: FeatureCache
    labels: Labels  # of these videos only
    holdout: Split  # how the train videos were divided, and which are on neither side
    skipped_ids: tuple[int, ...] = ()  # of videos of the split that extraction could not read: not among `labels`
    sources: tuple[ClipSource, ...] = ()  # what clips of the training set are drawn from; these videos come first

    @property
    def video_ids(self) -> tuple[int, ...]:
        """Ids in file order."""
        return tuple(video.id for video in self.labels.videos)

    @property
    def codec(self) -> Codec:
        """The codec of the cache."""
        return self.feature_cache.codec


def open_training_set(settings: Settings) -> VideoSet:
    """Open the train cache without the videos held out, and what is mixed in; refuses caches that lack anything."""
    videos = _open(settings, train_split(settings), "train")
    views = {video.id: train_views(settings, video) for video in videos.labels.videos}
    mixed = [(Path(mix.cache), mix.ratio) for mix in settings.train.mix]
    pseudo = pseudo_split(settings)
    mixed += [] if pseudo is None else [(pseudo.features, settings.pseudo.ratio)]
    own = ClipSource(feature_cache=videos.feature_cache, labels=videos.labels, views=views)
    sources = (own, *(_open_mixed(settings, videos, path, ratio) for path, ratio in mixed))
    if settings.cache.preload:
        workers = max(1, num_workers(settings.train.workers, torch.device(device_name(settings.device))))
        require_memory(list(map(_held, sources)), workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return replace(videos, sources=sources)


def _held(videos: ClipSource | VideoSet) -> tuple[FeatureCache, list[str]]:
    """What a process keeps with `cache.preload`: a cache, and its names of the videos, views included."""
    ids = {str(video.id) for video in videos.labels.videos}
    return videos.feature_cache, [n for n in videos.feature_cache.video_names() if n.partition("@")[0] in ids]


def open_evaluation_set(settings: Settings) -> VideoSet:
    """Open the videos that `evaluate.split` names.

    Raises ConfigError where there are none, FingerprintMismatch where the cache holds other features than the
    settings ask for.
    """
    split, paths = evaluation_split(settings)
    videos = _open(settings, paths, split)
    if settings.cache.preload:
        require_memory([_held(videos)], 1)
    return videos


def open_labelled_set(settings: Settings, asked: str) -> VideoSet:
    """The same where scores are needed; raises ConfigError, saying what asks for them, for a split without labels."""
    videos = open_evaluation_set(settings)
    if not videos.labels.has_tracks:
        hint = f"set data.holdout=0.1 and evaluate.split=holdout, or do without {asked}"
        raise ConfigError(f"{asked} needs public labels", where=videos.feature_cache.path, got="none", hint=hint)
    return videos


def evaluation_split(settings: Settings) -> tuple[str, SplitPaths]:
    """Which videos `evaluate.split` names, and where they lie.

    `auto` is the validation set where the config names one, unless it has no labels and there is a hold-out, which is
    taken then. Raises ConfigError where there is neither.
    """
    wanted = settings.evaluate.split
    valid = valid_split(settings)
    if wanted is SplitName.auto:
        holdout = valid is None or (settings.data.holdout > 0 and _unlabelled(valid))
        wanted = SplitName.holdout if holdout else SplitName.valid
    if wanted is SplitName.valid:
        if valid is None:
            raise ConfigError("evaluate.split is valid, but data.valid_labels is null", hint="use holdout")
        return "valid", valid
    if wanted is SplitName.holdout and settings.data.holdout == 0:
        raise ConfigError(
            "nothing to evaluate on: no validation labels, and no train videos held out",
            where="settings data.valid_labels, data.holdout",
            hint="set data.holdout=0.1 before training",
        )
    return wanted.value, train_split(settings)


def _unlabelled(paths: SplitPaths) -> bool:
    """Whether a split is known to have no labels; one that is not extracted yet is missed where it is opened."""
    try:
        return not FeatureCache.open(paths.features).labels().has_tracks
    except CacheError:
        return False


def chosen_videos(settings: Settings, split: str, labels: Labels) -> tuple[Labels, Split]:
    """The videos of a split among those of its label file, and how they were drawn."""
    if split == "valid" or settings.data.holdout == 0:
        return labels, Split.undivided(labels)
    holdout = holdout_split(labels, settings.data.holdout, settings.data.holdout_seed)
    return labels.subset(holdout.train_ids if split == "train" else holdout.holdout_ids), holdout


def without_skipped(labels: Labels, skipped: Collection[str]) -> tuple[Labels, tuple[int, ...]]:
    """The labels but for the videos that extraction left out (names of FeatureCache.skipped), and the ids of these."""
    names = {name.partition("@")[0] for name in skipped}
    left_out = tuple(video.id for video in labels.videos if str(video.id) in names)
    return (labels.subset(labels.video_by_id.keys() - set(left_out)) if left_out else labels), left_out


def _extracted(
    feature_cache: FeatureCache, labels: Labels, skipped: Collection[str], split: str
) -> tuple[Labels, tuple[int, ...]]:
    """The same of a split of a cache; says what is left out. Raises IncompleteVideo where that is all."""
    kept, left_out = without_skipped(labels, skipped)
    if left_out:
        what = f"extraction left out {len(left_out)} of {len(labels.videos)} videos ({some(left_out)})"
        record = shown(feature_cache.path / SKIPPED)
        if not kept.videos:
            hint = f"{record} says why; mend them, then `make extract`"
            raise IncompleteVideo(what, where=f"split {split}", hint=hint)
        warn_once(f"split {split}: {what}; {record} says why")
    return kept, left_out


def _open(settings: Settings, paths: SplitPaths, split: str) -> VideoSet:
    feature_cache = FeatureCache.open(
        local_copy(paths.features, settings.cache.stage_to), preload=settings.cache.preload
    )
    _require_settings(feature_cache, settings)
    _warn_of_other_labels(feature_cache, paths.labels)
    every = feature_cache.labels()
    labels, holdout = chosen_videos(settings, split, every)
    skipped = feature_cache.skipped()
    labels, skipped_ids = _extracted(feature_cache, labels, skipped, split)
    if left_out := without_skipped(every, skipped)[1]:
        holdout = holdout.without(left_out)
    if split == "train" and not labels.has_tracks:
        raise AnnotationError("the train split has no annotations", where=feature_cache.path)
    for video in labels.videos:
        feature_cache.video(video_group_name(video.id))
    return VideoSet(split=split, feature_cache=feature_cache, labels=labels, holdout=holdout, skipped_ids=skipped_ids)


def _warn_of_other_labels(feature_cache: FeatureCache, file: Path) -> None:
    """Say where the settings' label file is another than the cache's, whose labels are used; it may be elsewhere."""
    if file.is_file() and file.read_bytes() != feature_cache.labels_json():
        carried = shown(feature_cache.path / ANNOTATIONS)
        warn_once(
            f"{file} differs from {carried}, whose labels are used: `make extract` puts the file there in seconds"
        )


def _open_mixed(settings: Settings, videos: VideoSet, path: Path, ratio: float) -> ClipSource:
    """Open another cache to train on, but for what is held out; its frames may have other sizes, all else is alike."""
    other = FeatureCache.open(local_copy(path, settings.cache.stage_to), preload=settings.cache.preload)
    wanted = replace(videos.feature_cache.fingerprint, short_edge=other.fingerprint.short_edge)
    hint = (
        "both need the same detector, and one fit of the codec: extract this one into another cache.path, with the "
        f"detector.* of this config and cache.codec_from={videos.feature_cache.path}"
    )
    other.fingerprint.require(wanted, where=path, hint=hint)
    name = f"mixed in from {shown(path)}"
    labels, _ = _extracted(other, other.labels(), other.skipped(), name)
    held_out = [video.id for video in labels.videos if video.name in videos.holdout.holdout_folders]
    if held_out:
        warn_once(f"split {name}: {len(held_out)} of {len(labels.videos)} videos are held out ({some(held_out)})")
        labels = labels.subset(labels.video_by_id.keys() - set(held_out))
    here, there = ({(c.id, c.name) for c in held.categories} for held in (videos.labels, labels))
    if here != there:
        raise AnnotationError(
            "the labels of mixed caches have other categories: only in the train cache "
            f"{sorted(here - there)[:3]}, only there {sorted(there - here)[:3]}",
            where=path,
            hint="give both label files the same ids and names",
        )
    return ClipSource(feature_cache=other, labels=labels, ratio=ratio)


def _require_settings(feature_cache: FeatureCache, settings: Settings) -> None:
    """Check what the settings say about features against what the cache holds; the weights may be elsewhere."""
    stored, detector = feature_cache.fingerprint, settings.detector
    codec = feature_cache.root.codec_name
    wanted = {
        "detector.num_layers": (stored.num_layers, detector.num_layers),
        "detector.short_edge": (stored.short_edge or None, detector.short_edge),
        "detector.decoder": (stored.decoder, detector.decoder.value),
        "cache.codec": (codec, codec if settings.cache.codec is CodecName.auto else settings.cache.codec.value),
    }
    for key, (held, asked) in wanted.items():
        if held != asked:
            raise FingerprintMismatch(
                f"the cache was extracted with another {key}",
                where=feature_cache.path,
                expected=in_yaml(asked),
                got=in_yaml(held),
                hint=f"set {key}={in_yaml(held)}, or extract into another cache.path with `make extract`",
            )
