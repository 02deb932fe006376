"""Tracks of every video of a set, by the trained head or by the training-free baseline, in the submission format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from cache.labels import Labels, Video
from cache.layout import video_group_name
from cache.reader import CachedVideo
from evaluate.inference import VideoTracks
from evaluate.results import TrackPrediction
from train_head.data import VideoSet

VideoPredictor = Callable[[CachedVideo, Tensor], VideoTracks]
"""A cached video and its frame queries (T, L, Q, C), as stored -> tracks."""


def predict_videos(videos: VideoSet, predictor: VideoPredictor, title: str) -> list[TrackPrediction]:
    """Run a predictor over all videos of a set, with frames per second in the progress line."""
    predictions: list[TrackPrediction] = []
    total = sum(video.length for video in videos.labels.videos)
    with tqdm(total=total, desc=title, unit="frame") as progress:
        for video in videos.labels.videos:
            cached = videos.feature_cache.video(video_group_name(video.id))
            tracks = predictor(cached, torch.from_numpy(cached.frame_queries()))
            predictions.extend(_submitted(videos.labels, video, tracks))
            progress.update(video.length)
    return predictions


def map_chunks(cached: CachedVideo, chunk_frames: int, device: torch.device) -> Iterator[Tensor]:
    """Yield a video's stored maps in order, (t, R, H, W) each, read when they are needed."""
    num_frames = cached.attributes.num_frames
    for start in range(0, num_frames, chunk_frames):
        frames = range(start, min(start + chunk_frames, num_frames))
        yield torch.from_numpy(cached.mask_features(frames)).to(device)


def _submitted(labels: Labels, video: Video, tracks: VideoTracks) -> Iterator[TrackPrediction]:
    for score, label, segmentations in zip(tracks.scores, tracks.labels, tracks.masks, strict=True):
        yield TrackPrediction(
            video_id=video.id,
            category_id=labels.categories[label].id,
            score=score,
            segmentations=segmentations,
        )
