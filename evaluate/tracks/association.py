"""Clips instead of whole videos: the head on short clips, their tracks linked by mask IoU (VITA §4.3, Table 5).

Shapes: T frames, V video queries, M tracks of a clip, N tracks of the video so far (in matrices: those seen in the
compared frames), K categories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cache.labels.masks import Rle
from cache.labels.tracks import Video
from cache.reader import CachedVideo
from evaluate.metrics.video_iou import TrackMasks, track_ious
from evaluate.metrics.weighted import FloatArray
from evaluate.tracks.inference import VideoTracks, best_labels
from evaluate.tracks.mask_decoding import MaskDecoder
from evaluate.tracks.predictors import HeadPredictor

MIN_IOU = 0.1  # below, a clip's track is a new track


class Matching(Enum):
    """How the tracks of a clip find their counterparts."""

    greedy = "greedy"  # the pair of the largest IoU first
    hungarian = "hungarian"  # the pairs whose IoUs have the largest sum


@dataclass(frozen=True, kw_only=True)
class ClipTracks:
    """What the head finds in some consecutive frames: the M queries with the likeliest categories."""

    frames: range
    probability_MK: Tensor
    foreground_M: Tensor  # summed probability of the foreground pixels
    area_M: Tensor  # pixels
    masks: tuple[Sequence[Rle | None], ...]


def clip_ranges(num_frames: int, length: int) -> list[range]:
    """Clips of `length` frames (the last may be shorter) that share half of their frames with the next; of 1: none."""
    step = length - length // 2
    starts = range(0, max(1, num_frames - length // 2), step)
    return [range(start, min(start + length, num_frames)) for start in starts]


@torch.no_grad()
def predict_clips(predictor: HeadPredictor, cached: CachedVideo, length: int) -> Iterator[ClipTracks]:
    """Run the head on every clip of a video, for itself."""
    sizes = cached.attributes
    for frames in clip_ranges(sizes.num_frames, length):
        outputs = predictor.head.predict_stream(predictor.tokens(cached, frames), len(frames))
        probability_VK = outputs.class_logits_VK.float().softmax(dim=-1)[:, :-1]
        queries_M = best_labels(probability_VK, predictor.choices.top_k, repeats=False).queries_M
        weights = predictor.head.fold_masks(outputs.mask_embed_VC[queries_M], predictor.decoding)
        decoder = MaskDecoder(len(queries_M), sizes.image_hw, sizes.original_hw, predictor.device)
        decoder.decode(weights.logits(map_tRHW) for map_tRHW in predictor.maps(cached, frames))
        yield ClipTracks(
            frames=frames,
            probability_MK=probability_VK[queries_M].cpu(),
            foreground_M=decoder.foreground_M.cpu(),
            area_M=decoder.area_M.cpu(),
            masks=tuple(decoder.masks(row) for row in range(len(queries_M))),
        )


@dataclass(kw_only=True)
class _Track:
    """A track of the video so far: sums over its clips, and its masks by frame."""

    probability_K: Tensor
    num_frames: int
    foreground: float
    area: float
    masks: list[Rle | None]


def link(clips: Sequence[ClipTracks], image_hw: tuple[int, int], matching: Matching, top_k: int) -> VideoTracks:
    """Join the tracks of overlapping clips whose masks agree on the shared frames, of adjacent clips on those between.

    Class probabilities are means over a track's clips, weighted by their frames; the earlier clip decides the masks of
    shared frames.
    """
    num_frames = clips[-1].frames.stop
    tracks: list[_Track] = []
    for before, clip in zip([None, *clips[:-1]], clips, strict=True):
        owners = dict[int, int]() if before is None else _matches(tracks, before, clip, image_hw, matching)
        for row, masks in enumerate(clip.masks):
            if row not in owners:
                tracks.append(_new_track(clip.probability_MK.shape[1], num_frames))
            track = tracks[owners.get(row, -1)]
            track.probability_K += clip.probability_MK[row] * len(clip.frames)
            track.num_frames += len(clip.frames)
            track.foreground += float(clip.foreground_M[row])
            track.area += float(clip.area_M[row])
            for frame, rle in zip(clip.frames, masks, strict=True):
                if before is None or row not in owners or frame >= before.frames.stop:
                    track.masks[frame] = rle
    return _best(tracks, top_k)


def _new_track(num_labels: int, num_frames: int) -> _Track:
    return _Track(
        probability_K=torch.zeros(num_labels), num_frames=0, foreground=0.0, area=0.0, masks=[None] * num_frames
    )


def _matches(
    tracks: Sequence[_Track], before: ClipTracks, clip: ClipTracks, image_hw: tuple[int, int], matching: Matching
) -> dict[int, int]:
    """The track that continues in each row of the clip, by row."""
    shared = max(0, before.frames.stop - clip.frames.start)
    # Adjacent clips share no frame: the last of the one stands against the first of the other.
    compared = (
        range(clip.frames.start, before.frames.stop) if shared else range(before.frames.stop - 1, before.frames.stop)
    )
    pieces = Video(id=0, height=image_hw[0], width=image_hw[1], length=len(compared), file_names=())
    seen = [n for n, track in enumerate(tracks) if any(track.masks[frame] is not None for frame in compared)]
    earlier = [TrackMasks.of(tracks[n].masks[compared.start : compared.stop], pieces) for n in seen]
    later = [TrackMasks.of(masks[: len(compared)], pieces) for masks in clip.masks]
    ious_NM = track_ious(earlier, later)
    return {row: seen[n] for n, row in assign(ious_NM, matching) if ious_NM[n, row] >= MIN_IOU}


def assign(ious_NM: FloatArray, matching: Matching) -> list[tuple[int, int]]:
    """Pairs (n, m), each n and each m at most once."""
    if matching is Matching.hungarian:
        rows, columns = linear_sum_assignment(ious_NM, maximize=True)
        return list(zip(rows.tolist(), columns.tolist(), strict=True))
    pairs: list[tuple[int, int]] = []
    for index in np.argsort(-ious_NM, axis=None, kind="stable").tolist():
        n, m = divmod(index, ious_NM.shape[1])
        if all(n != taken_n and m != taken_m for taken_n, taken_m in pairs):
            pairs.append((n, m))
    return pairs


def _best(tracks: Sequence[_Track], top_k: int) -> VideoTracks:
    probability_NK = torch.stack([track.probability_K / track.num_frames for track in tracks])
    quality_N = torch.tensor([track.foreground / (track.area + 1e-6) for track in tracks])
    found = best_labels(probability_NK, top_k)
    rows = found.queries_M[found.row_N]
    return VideoTracks(
        scores=tuple((found.class_scores_N * quality_N[rows]).tolist()),
        labels=tuple(found.labels_N.tolist()),
        query_index=tuple(rows.tolist()),
        mask_quality=tuple(quality_N[rows].tolist()),
        masks=tuple(tuple(tracks[row].masks) for row in rows.tolist()),
    )
