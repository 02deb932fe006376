"""Tracks of every video of a set, by the trained head or by the training-free baseline, in the submission format."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cache.labels.tracks import Labels, Video
from cache.layout import video_group_name
from cache.progress import StageProgress
from evaluate.results import TrackPrediction
from evaluate.tracks.inference import VideoTracks
from evaluate.tracks.predictors import VideoPredictor
from train_head.data.video_sets import VideoSet

VIDEOS_AT_ONCE = 2  # while one is read or encoded, another can compute


def predict_videos(videos: VideoSet, predictor: VideoPredictor, title: str) -> list[TrackPrediction]:
    """Run a predictor over all videos of a set, with frames per second in the progress line.

    Within a video, reading, computing and encoding already overlap (`read_ahead`); several videos at once keep all
    three busy where videos are short.
    """
    predictions: list[TrackPrediction] = []
    total = sum(video.length for video in videos.labels.videos)
    with (
        StageProgress(title, unit="frame", total=total) as progress,
        ThreadPoolExecutor(max_workers=VIDEOS_AT_ONCE) as pool,
    ):
        cached = (videos.feature_cache.video(video_group_name(video.id)) for video in videos.labels.videos)
        for video, tracks in zip(videos.labels.videos, pool.map(predictor, cached), strict=True):
            predictions.extend(submitted(videos.labels, video, tracks))
            progress.advance(video.length)
    return predictions


def submitted(labels: Labels, video: Video, tracks: VideoTracks) -> Iterator[TrackPrediction]:
    """A video's tracks in the submission format."""
    for score, label, segmentations in zip(tracks.scores, tracks.labels, tracks.masks, strict=True):
        yield TrackPrediction(
            video_id=video.id,
            category_id=labels.categories[label].id,
            score=score,
            segmentations=segmentations,
        )
