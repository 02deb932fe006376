"""What the similarity loss did: how alike a video's frame queries and video queries are (VITA §3.3, Eq. 5).

Shapes: T frames, N objects, V video queries, C channels, F matched frame queries, M matched video queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cache.errors import shown
from cache.labels.tracks import Labels, Video
from cache.layout import video_group_name
from cache.media.geometry import transform_of
from configs.schema import Settings
from evaluate.metrics.weighted import FloatArray, IntArray
from evaluate.pictures.overlays import evenly
from evaluate.tracks.predictors import head_predictor
from train_head.build import build_criterion, point_config
from train_head.data.clip_labels import read_targets
from train_head.data.clips import Clip
from train_head.data.sources import CachedSource
from train_head.data.video_sets import VideoSet
from train_head.heads.contract import HeadOutputs, TrackHead
from train_head.heads.vita import VitaHead
from train_head.losses.matcher import ClipMatch
from train_head.losses.points import RandomPoints

MOST_FRAMES, MOST_OBJECTS = 24, 8


@dataclass(frozen=True, kw_only=True)
class SimilarityMatrix:
    """Likeness of the frame queries (rows) and the video queries (columns) that are matched to a video's objects."""

    video: str
    objects: tuple[str, ...]  # category of every object
    trained: bool  # by a similarity loss: probabilities of being one object; else cosines of the queries themselves
    values_FM: FloatArray
    row_objects_F: IntArray  # ascending
    column_objects_M: IntArray  # ascending

    @property
    def agreement(self) -> float:
        """Share of the frame queries that are most alike to the video query of their own object."""
        return float((self.column_objects_M[self.values_FM.argmax(axis=1)] == self.row_objects_F).mean())


def video_of_many_objects(labels: Labels) -> Video | None:
    """The labelled video with most objects up to MOST_OBJECTS, None where none has two."""
    counts = {video.id: len([t for t in labels.tracks_of(video.id) if not t.iscrowd]) for video in labels.videos}
    fitting = [video for video in labels.videos if 2 <= counts[video.id] <= MOST_OBJECTS]
    return max(fitting, key=lambda video: counts[video.id], default=None)


@torch.no_grad()
def similarity_matrix(settings: Settings, videos: VideoSet, video: Video) -> SimilarityMatrix | None:
    """Match a video's queries to its objects as training does, and compare them.

    None where nothing is matched, or the head has no such embeddings. Raises WeightsError for a run without a head.
    """
    predictor = head_predictor(settings, videos)
    last_layer = replace(settings, train=replace(settings.train, num_layers=1))
    source = CachedSource(last_layer, videos, predictor.device)
    clip = source.place(_clip(videos, video), lambda tensor: tensor.to(predictor.device))
    targets = source.targets(clip)
    queries_1TQC = source.heads.normed(clip.frame_queries_TLQC[:, -1])[None]
    outputs = predictor.head(queries_1TQC[None])
    embedded = _embedded(predictor.head, queries_1TQC, outputs)
    if embedded is None:
        return None
    (match,) = build_criterion(settings.loss, predictor.device).match(
        outputs,
        predictor.head.fold_masks(outputs.mask_embed_DLBVC, source.decoding),
        [source.decoding.expand(clip.map_TRHW, clip.map_hw)],
        [targets],
        [RandomPoints.for_clip(point_config(settings.loss), settings.seed, 0, predictor.device)],
    )
    assert targets.frame_queries_LTN is not None
    tracks = [track for track in videos.labels.tracks_of(video.id) if not track.iscrowd]
    names = {category.id: category.name for category in videos.labels.categories}
    shown = [names[tracks[identity].category_id] for identity in targets.identities_N.tolist()]
    trained = outputs.frame_similarity_LBTQC is not None
    return _compare(embedded, trained, targets.frame_queries_LTN[0], match, video.name, shown)


def _clip(videos: VideoSet, video: Video) -> Clip:
    """All frames of a video, or MOST_FRAMES spread over it."""
    frames = tuple(evenly(video.length, MOST_FRAMES))
    cached = videos.feature_cache.video(video_group_name(video.id))
    return Clip(
        index=0,
        key=cached.name,
        name=video.name,
        cache=shown(videos.feature_cache.path),
        num_tracks=len(videos.labels.tracks_of(video.id)),
        frames=frames,
        frame_queries_TLQC=torch.from_numpy(cached.frame_queries(frames)),
        map_TRHW=torch.from_numpy(cached.mask_features(frames)),
        map_hw=cached.attributes.map_hw,
        targets=read_targets(videos.labels, video.id, frames, [transform_of(cached.attributes)] * len(frames)),
    )


def _compare(
    embedded: tuple[Tensor, Tensor], trained: bool, matches_TN: Tensor, match: ClipMatch, video: str, objects: list[str]
) -> SimilarityMatrix | None:
    frames_TQC, videos_VC = embedded
    object_F, frame_F = (matches_TN.t() >= 0).nonzero(as_tuple=True)  # by object, then by frame
    object_M, query_M = match.object_DLM[-1, 0], match.query_DLM[-1, 0]
    if not len(object_F) or not len(object_M):
        return None
    chosen_FC = frames_TQC[frame_F, matches_TN[frame_F, object_F]]
    likeness_FM = chosen_FC @ videos_VC[query_M].t()
    return SimilarityMatrix(
        video=video,
        objects=tuple(objects),
        trained=trained,
        values_FM=(likeness_FM.sigmoid() if trained else likeness_FM).double().cpu().numpy(),
        row_objects_F=object_F.cpu().numpy(),
        column_objects_M=object_M.cpu().numpy(),
    )


def _embedded(head: TrackHead, queries_1TQC: Tensor, outputs: HeadOutputs) -> tuple[Tensor, Tensor] | None:
    """Embeddings of the frame queries (T, Q, C) and the video queries (V, C); None where the head has none."""
    if outputs.frame_similarity_LBTQC is not None and outputs.clip_similarity_LBVC is not None:
        return outputs.frame_similarity_LBTQC[0, 0], outputs.clip_similarity_LBVC[0, 0]
    if not isinstance(head, VitaHead):
        return None
    encoded_1TQC = head.encode(queries_1TQC, head.config.shift_in_training)
    return F.normalize(encoded_1TQC[0], dim=-1), F.normalize(outputs.video_queries_DLBVC[-1, 0, 0], dim=-1)
