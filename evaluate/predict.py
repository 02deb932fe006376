"""Tracks of footage of one's own: from its cache and a trained head to tracks.json, an overlay and a contact sheet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.errors import ConfigError
from cache.fingerprint import sha256_file
from cache.labels.splits import Split
from cache.labels.tracks import Category, Labels, Video
from cache.layout import video_group_name, write_file_atomically
from cache.media.footage import Footage, read_record
from cache.media.video_writer import VideoWriter
from cache.progress import StageProgress, with_progress
from cache.reader import FeatureCache
from configs.schema import Settings
from evaluate.pictures.labelled_frames import contact_sheet, draw_labelled, enlargement
from evaluate.pictures.overlays import DrawnTrack, evenly, predicted_tracks
from evaluate.results import TrackPrediction
from evaluate.tracks.predictors import checkpoint_path, head_predictor
from evaluate.tracks.whole_video import submitted
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.data.video_sets import VideoSet

TRACKS, OVERLAY, SHEET = "tracks.json", "overlay.mp4", "contact_sheet.png"
COMPLETE = "complete.json"
"""Written last: what the others were made of."""
_SHEET_FRAMES = 12


@dataclass(frozen=True, kw_only=True)
class PredictedFootage:
    """What was written of one piece of footage."""

    folder: Path
    footage: Footage
    kept: bool  # from an earlier call that made the same
    tracks: int
    drawn: int


def predict(settings: Settings, run: Path, features: Path, output: Path, min_score: float) -> list[PredictedFootage]:
    """Predict the tracks of all footage in a cache (`python -m extract video`); each gets a folder below `output`.

    `run`: the folder of the head. `min_score`: of the tracks that are drawn, 0 to 1; tracks.json has all. Raises
    ConfigError for another `min_score`, WeightsError where there is no head, FingerprintMismatch where it was trained
    on other features, FrameError where the footage has gone. What is there, by the same head and choices, stays.
    """
    if not 0 <= min_score <= 1:
        raise ConfigError("not a score", where="--score (SCORE of make)", expected="0 to 1", got=min_score)
    footage = read_record(features)
    run = run.absolute()
    settings = replace(settings, runs=str(run.parent), name=run.name)
    videos = _video_set(FeatureCache.open(features), footage, load_checkpoint(run / CHECKPOINT).category_names)
    predictor = head_predictor(settings, videos)
    written: list[PredictedFootage] = []
    complete = videos.feature_cache.video_names()
    for video, piece in zip(videos.labels.videos, footage, strict=True):
        if video_group_name(video.id) not in complete:
            print(f"warning: {piece.source}: its extraction has not ended; give it to `python -m extract video` again")
            continue
        made_of = _digest(settings, videos.feature_cache, piece, min_score)
        taken = [other.footage.name for other in written]
        folder = output / (f"{piece.name}-{video.id}" if piece.name in taken else piece.name)
        if (counts := _complete(folder, made_of)) is not None:
            written.append(PredictedFootage(folder=folder, footage=piece, kept=True, **counts))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPLETE).unlink(missing_ok=True)
        cached = videos.feature_cache.video(video_group_name(video.id))
        with StageProgress(f"predict {piece.name}", unit="frame", total=video.length) as progress:
            found = replace(predictor, advance=progress.advance)(cached)
        tracks = list(submitted(videos.labels, video, found))
        _write_tracks(folder / TRACKS, videos.labels, piece, tracks)
        drawn = _draw(folder, predicted_tracks(videos.labels, tracks, video.id, min_score), piece)
        counts = {"tracks": len(tracks), "drawn": drawn}
        write_file_atomically(folder / COMPLETE, json.dumps({"sha256": made_of, **counts}).encode())
        written.append(PredictedFootage(folder=folder, footage=piece, kept=False, **counts))
    return written


def _digest(settings: Settings, feature_cache: FeatureCache, piece: Footage, min_score: float) -> str:
    """SHA-256 (hex) of all that decides what is written of one piece of footage."""
    chosen = settings.evaluate
    decides = {
        "checkpoint": sha256_file(checkpoint_path(settings)),
        "features": feature_cache.fingerprint.to_json(),
        "footage": asdict(piece),
        "choices": [chosen.top_k, chosen.repeats, chosen.keep_queries, min_score],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _complete(folder: Path, made_of: str) -> dict[str, int] | None:
    """How many tracks a folder holds, and how many are drawn, where it was made of just this and nothing is missing."""
    if not all((folder / name).exists() for name in (TRACKS, OVERLAY, SHEET, COMPLETE)):
        return None
    try:
        stored = json.loads((folder / COMPLETE).read_text())
        return {name: stored[name] for name in ("tracks", "drawn")} if stored["sha256"] == made_of else None
    except (ValueError, KeyError, TypeError):  # Damaged, so nobody knows what the others were made of.
        return None


def _video_set(feature_cache: FeatureCache, footage: Sequence[Footage], categories: Sequence[str]) -> VideoSet:
    """The footage as a split without labels. Category ids count from 1, as in the data sets of the field."""
    labels = Labels(
        categories=tuple(Category(id=index, name=name) for index, name in enumerate(categories, start=1)),
        videos=tuple(
            Video(
                id=number,
                width=piece.width,
                height=piece.height,
                length=len(piece.seconds),
                file_names=tuple(f"{piece.name}/{frame * piece.stride:06d}" for frame in range(len(piece.seconds))),
            )
            for number, piece in enumerate(footage, start=1)
        ),
        tracks=(),
        has_tracks=False,
    )
    return VideoSet(split="video", feature_cache=feature_cache, labels=labels, holdout=Split.undivided(labels))


def _write_tracks(path: Path, labels: Labels, piece: Footage, tracks: Sequence[TrackPrediction]) -> None:
    """The submission format; each entry also has its category's name and, per frame, the seconds since the first."""
    names = {category.id: category.name for category in labels.categories}
    entries = [
        {**track.to_json(), "category_name": names[track.category_id], "timestamps": list(piece.seconds)}
        for track in tracks
    ]
    write_file_atomically(path, json.dumps(entries).encode())


def _draw(folder: Path, tracks: Sequence[DrawnTrack], piece: Footage) -> int:
    """Write the overlay and the contact sheet in one pass; returns how many tracks were drawn."""
    tracks = _distinct(tracks)
    count, scale = len(piece.seconds), enlargement((piece.height, piece.width))
    sampled = set(evenly(count, _SHEET_FRAMES))
    pictures: list[tuple[float, NDArray[np.uint8]]] = []
    with VideoWriter(folder / OVERLAY, (piece.height * scale, piece.width * scale)) as writer:
        moments = with_progress(piece.seconds, f"draw {piece.name}", unit="frame")
        for index, (image, seconds) in enumerate(zip(piece.frames(), moments, strict=True)):
            picture = draw_labelled(image, tracks, index)
            writer.add(picture, seconds)
            if index in sampled:
                pictures.append((seconds, picture))
    contact_sheet(pictures).save(folder / SHEET)
    return len(tracks)


def _distinct(tracks: Sequence[DrawnTrack]) -> list[DrawnTrack]:
    """Without those whose masks a better track has: one video query may have several labels."""
    kept: list[DrawnTrack] = []
    for track in tracks:
        if all(list(track.segmentations) != list(other.segmentations) for other in kept):
            kept.append(track)
    return kept
