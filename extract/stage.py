"""Stage one: run the frozen detector over every video of every split once, into the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cache.codecs.rate_distortion import format_table
from cache.errors import CacheError, FrameError, VideoBusy
from cache.fingerprint import Fingerprint, Provenance
from cache.layout import ANNOTATIONS
from cache.reader import FeatureCache
from cache.remote_writer import opened_writer
from cache.room import require_possible
from cache.storage.connection import remote_url
from cache.storage.contract import Store
from cache.storage.folder import FolderStore
from cache.storage.hdf5 import Hdf5Store
from cache.storage.locks import sweep_locks
from cache.storage.stores import open_store
from cache.writer import check_continuation, video_sources
from configs.cards import write_cache_card
from configs.schema import Settings
from extract.calibration import ChosenCodec, calibrate, choose_codec, held_codec
from extract.detector.checkpoints import weights_sha256
from extract.detector.engines import configured_detector
from extract.detector.frozen import FrameDetector
from extract.fill import Extractor, fill, opened_extractor, require_workers
from extract.fingerprint import fingerprint
from extract.jobs import SplitJobs, open_jobs
from extract.record import write_skipped
from extract.room import Workload, local_folder, require_room_for
from extract.streaming import Outcome


def extract(settings: Settings, only: Sequence[str] = (), *, clear_dead_locks: bool = False) -> None:
    """Extract every split of a config that is not yet in its cache; everything checkable is checked first.

    A remote cache (`cache.path=s3://...`) is uploaded video by video (cache.remote_writer). `clear_dead_locks`: take
    over videos whose writers on other machines are dead. Raises VitaCacheError for unreadable labels, frames, weights,
    a cache of other content, or a disk without room; in the end, for videos that were skipped or are left to others.
    """
    require_workers(settings)
    if settings.extract.threads is not None:
        torch.set_num_threads(settings.extract.threads)
    asked = open_jobs(settings, only)
    _require_places(settings, asked)
    detector = _open_detector(settings)
    chosen = choose_codec(settings, detector)
    print(chosen.reason)
    require_room_for(settings, detector, [Workload.of(jobs) for jobs in asked], chosen)
    digest = weights_sha256(Path(settings.detector.weights))
    chosen = held_codec(settings) or chosen  # Another process may have begun meanwhile, with a fit of its own.
    wanted = fingerprint(settings, detector, digest, chosen.codec)
    if settings.cache.codec_from is not None:
        lender = FeatureCache.open(settings.cache.codec_from)
        hint = "cache.codec_from lends the codec of a cache of the same detector"
        lender.fingerprint.require(
            replace(wanted, short_edge=lender.fingerprint.short_edge), where=settings.cache.codec_from, hint=hint
        )
    outcomes = []
    with opened_extractor(settings, detector) as extractor:
        for jobs in asked:
            if clear_dead_locks:
                sweep_locks(jobs.split.features, of_other_hosts=True)
            outcomes.append(_extract_split(settings, detector, wanted, chosen, jobs, extractor))
    skipped = [
        f"{jobs.split.name}/{name}" for jobs, outcome in zip(asked, outcomes, strict=True) for name in outcome.skipped
    ]
    if skipped and not settings.extract.allow_skipped:
        hint = "training and evaluation do without them; extract.allow_skipped=true takes this for success"
        raise FrameError(f"{len(skipped)} videos were skipped, such as {skipped[0]}", hint=hint)
    _require_none_busy(settings, asked, outcomes)


def _require_places(settings: Settings, asked: Sequence[SplitJobs]) -> None:
    """Raise CacheError where what is to be written can have no folder; an HDF5 file has its own refusal."""
    if remote_url(settings.cache.path) is not None:
        require_possible(local_folder(settings))
        return
    for jobs in asked:
        if not jobs.split.features.is_file():
            require_possible(jobs.split.features)


def _require_none_busy(settings: Settings, asked: Sequence[SplitJobs], outcomes: Sequence[Outcome]) -> None:
    """Raise VideoBusy where others have not finished what was left to them: the cache is not to be trained on yet."""
    unfinished = [
        f"{jobs.split.name}/{job.name}"
        for jobs, outcome in zip(asked, outcomes, strict=True)
        for job in (Workload.of(jobs).jobs if outcome.busy else ())
        if job.name in outcome.busy
    ]
    if unfinished:
        what = f"{len(unfinished)} videos are being extracted by others, such as {unfinished[0]}"
        hint = "train when they have finished: then the same command ends with status 0, and does what they left"
        raise VideoBusy(what, where=settings.cache.path, hint=hint)


def print_rate_distortion(settings: Settings) -> None:
    """Measure every codec on sample frames of the train split; nothing is extracted or stored."""
    _, calibration = calibrate(settings, _open_detector(settings))
    print(format_table(calibration))


def _open_detector(settings: Settings) -> FrameDetector:
    detector = configured_detector(settings)
    print(detector.report)
    return detector


def _extract_split(
    settings: Settings,
    detector: FrameDetector,
    wanted: Fingerprint,
    chosen: ChosenCodec,
    asked: SplitJobs,
    extractor: Extractor,
) -> Outcome:
    split = asked.split
    wanted = replace(wanted, short_edge=asked.short_edge or 0)
    store = open_store(split.features)
    if _is_read_only(store) and _lacks_nothing(store, asked, wanted):
        print(f"extract {split.name}: all {len(asked.jobs)} videos are in {store.path} already")
        return Outcome()
    if isinstance(store, Hdf5Store):
        what = f"the file lacks videos of {split.labels} or has other labels, and nothing is added to an HDF5 file"
        hint = f"`python -m cache import {store.path} {split.features}` makes it a folder; then run the same command"
        raise CacheError(what, where=store.path, hint=hint)
    with opened_writer(
        split.features,
        settings.cache.stage_to,
        fingerprint=wanted,
        heads=detector.prediction_heads(),
        codec=chosen.codec,
        labels_json=asked.labels_json,
        provenance=Provenance.gather(
            {"weights": settings.detector.weights, "labels": str(split.labels), "frames": str(split.frames)}
        ),
        calibration=chosen.calibration,
    ) as writer:
        write_cache_card(writer.path, settings, split.name, str(split.frames))
        outcome = fill(writer, asked, extractor, f"extract {split.name}")
        write_skipped(writer, outcome.skipped)
    return outcome


def _is_read_only(store: Store) -> bool:
    if isinstance(store, FolderStore):
        return store.path.is_dir() and not os.access(store.path, os.W_OK)
    return isinstance(store, Hdf5Store)


def _lacks_nothing(store: Store, asked: SplitJobs, wanted: Fingerprint) -> bool:
    """Whether a cache holds all videos and these labels. Raises FingerprintMismatch where it holds other features."""
    complete = check_continuation(store, wanted, video_sources(asked.labels_json))
    return store.read_file(ANNOTATIONS) == asked.labels_json and complete >= {job.name for job in asked.jobs}
