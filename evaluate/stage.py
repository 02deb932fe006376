"""Evaluate a run: tracks of the head and of the baseline from the same cache, scored if the labels are public."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cache.category_map import category_pairs
from cache.reader import CachedVideo
from configs.command import device_name
from configs.schema import CheckpointChoice, Settings
from evaluate.baseline import track_without_training
from evaluate.inference import VideoTracks, predict_video
from evaluate.metrics import VideoMetrics, evaluate_tracks
from evaluate.stored import BASELINE, HEAD, store_predictions
from evaluate.whole_video import VideoPredictor, map_chunks, predict_videos
from train_head.build import decoding_of, map_channels
from train_head.checkpoint import BEST, CHECKPOINT, load_checkpoint
from train_head.data import VideoSet, open_evaluation_set
from train_head.detector_predictions import FrozenHeads
from train_head.frame_matches import label_map


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics by method (None for a split without public labels) and where they were written."""

    folder: Path
    split: str
    metrics: dict[str, VideoMetrics | None]
    seconds: dict[str, float]


def evaluate(settings: Settings) -> Evaluation:
    """Predict with the run's head and with the baseline, write results.json, its zip and metrics.json for both.

    Raises WeightsError where the run has no checkpoint, FingerprintMismatch where head and cache differ.
    """
    run = Path(settings.runs) / settings.name
    videos = open_evaluation_set(settings)
    metrics: dict[str, VideoMetrics | None] = {}
    seconds: dict[str, float] = {}
    predictors = {HEAD: head_predictor(settings, videos, run), BASELINE: baseline_predictor(settings, videos)}
    for method, predictor in predictors.items():
        started = time.perf_counter()
        predictions = predict_videos(videos, predictor, f"evaluate {method}")
        seconds[method] = time.perf_counter() - started
        metrics[method] = store_predictions(
            settings, videos, method, predictions, seconds=seconds[method], trained=method == HEAD
        )
    return Evaluation(folder=run, split=videos.split, metrics=metrics, seconds=seconds)


def score_head(settings: Settings) -> float | None:
    """AP of the run's newest checkpoint, without writing anything; None where the split has no labels."""
    videos = open_evaluation_set(settings)
    if not videos.labels.has_tracks:
        return None
    newest = replace(settings, evaluate=replace(settings.evaluate, checkpoint=CheckpointChoice.last))
    predictor = head_predictor(newest, videos, Path(settings.runs) / settings.name)
    return evaluate_tracks(videos.labels, predict_videos(videos, predictor, "evaluate")).AP


def head_predictor(settings: Settings, videos: VideoSet, run: Path) -> VideoPredictor:
    """Whole-video inference by the head in the run's checkpoint."""
    device = torch.device(device_name(settings.device))
    path = run / (BEST if settings.evaluate.checkpoint is CheckpointChoice.best else CHECKPOINT)
    checkpoint = load_checkpoint(path)
    checkpoint.require_cache(videos.feature_cache, path, any_codec=True)
    head = checkpoint.build_head(device)
    heads = videos.feature_cache.heads
    frozen, decoding = FrozenHeads(heads).to(device), decoding_of(videos.codec, map_channels(heads)).to(device)

    def predict(cached: CachedVideo, frame_queries_TLQC: Tensor) -> VideoTracks:
        return predict_video(
            head,
            frozen.normed(frame_queries_TLQC[:, -1].to(device)),
            map_chunks(cached, settings.evaluate.chunk_frames, device),
            decoding=decoding,
            image_hw=cached.attributes.image_hw,
            original_hw=cached.attributes.original_hw,
            top_k=settings.evaluate.top_k,
            repeats=settings.evaluate.repeats,
        )

    return predict


def baseline_predictor(settings: Settings, videos: VideoSet) -> VideoPredictor:
    """Training-free tracking; only categories that the detector knows can be found."""
    device = torch.device(device_name(settings.device))
    stored, categories = videos.feature_cache.heads, videos.labels.categories
    frozen, decoding = FrozenHeads(stored).to(device), decoding_of(videos.codec, map_channels(stored)).to(device)
    pairs = category_pairs(categories, stored.category_names)
    label_map_KJ = label_map("category_map", len(categories), stored.num_classes, pairs).to(device)

    def predict(cached: CachedVideo, frame_queries_TLQC: Tensor) -> VideoTracks:
        return track_without_training(
            frozen,
            frozen.normed(frame_queries_TLQC[:, -1].to(device)),
            map_chunks(cached, settings.evaluate.chunk_frames, device),
            decoding=decoding,
            label_map_KJ=label_map_KJ,
            image_hw=cached.attributes.image_hw,
            original_hw=cached.attributes.original_hw,
            top_k=settings.evaluate.top_k,
            repeats=settings.evaluate.repeats,
        )

    return predict
