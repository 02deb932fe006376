"""Average precision and recall of tracks, as YouTube-VIS and OVIS define them.

The benchmarks' scorer is a copy of COCO's. Here stock pycocotools' COCOeval matches tracks, once it is told their
video IoUs, their areas and the benchmarks' area ranges; `evaluate.metrics.weighted` accumulates its matches.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cache.errors import AnnotationError
from cache.labels.tracks import Labels, Video, mask_areas
from evaluate.metrics.video_iou import TrackMasks, track_ious
from evaluate.metrics.weighted import MAX_DETECTIONS, CategoryMatches, FloatArray, Scores, weighted_scores
from evaluate.results import TrackPrediction

AreaRange = tuple[float, float]
ALL_AREAS: AreaRange = (0.0, 1e10)
AREA_RANGES: dict[str, AreaRange] = {"s": (0.0, 128.0**2), "m": (128.0**2, 256.0**2), "l": (256.0**2, 1e10)}


@dataclass(frozen=True, kw_only=True)
class VideoMetrics:
    """The benchmarks' numbers, fractions in [0, 1]; None where there is no object to find.

    AP averages IoU thresholds 0.50:0.05:0.95 and categories. s, m, l: tracks whose mean area is below
    128^2, between, above 256^2 pixels. ARn: recall with n tracks a video and category.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    APs: float | None
    APm: float | None
    APl: float | None
    AR1: float | None
    AR10: float | None
    AR100: float | None
    ARs: float | None
    ARm: float | None
    ARl: float | None
    per_category: dict[str, float | None]

    def to_json(self) -> dict[str, object]:
        """The content of metrics.json; None becomes null."""
        return asdict(self)


class VideoEvaluation:
    """Predictions matched to the labels once; scores can then be read for any weights of the videos."""

    def __init__(self, labels: Labels, predictions: Sequence[TrackPrediction]) -> None:
        """Match; AnnotationError where the labels have no tracks or a prediction does not fit its video."""
        if not labels.has_tracks:
            raise AnnotationError(
                "the label file has no annotations to score against",
                hint="Score on a labelled split, e.g. a part of train that was held out.",
            )
        self.labels, self.predictions = labels, predictions
        self.found_masks = [TrackMasks.of(p.segmentations, _video_of(p, labels)) for p in predictions]
        self.label_masks = [
            TrackMasks.of(track.segmentations, labels.video_by_id[track.video_id], iscrowd=track.iscrowd)
            for track in labels.tracks
        ]
        self._coco = _TrackEval(
            _ground_truth(labels, self.label_masks), _detections(labels, predictions, self.found_masks)
        )
        self.matches = self.matches_of(ALL_AREAS)

    def matches_of(self, areas: AreaRange, objects: Container[int] | None = None) -> list[CategoryMatches]:
        """Match objects whose mean area lies in a range of pixels, by category; COCO ignores the others.

        `objects`, where given, are the only ones to find: indices among the labels' tracks.
        """
        for track in itertools.chain.from_iterable(self._coco._gts.values()):
            track["ignore"] = track["iscrowd"] or (objects is not None and track["id"] - 1 not in objects)
        return [self._category_matches(category.id, areas) for category in self.labels.categories]

    def scores(self, weights_SV: FloatArray | None = None) -> Scores:
        """Scores under S sets of weights of the videos, in the order of the labels; None: the split as it is."""
        return weighted_scores(self.matches, self._as_it_is() if weights_SV is None else weights_SV)

    def metrics(self) -> VideoMetrics:
        """The 12 numbers and the AP of every category."""
        scores = self.scores()
        stats = {name: values.item() for name, values in scores.headline().items()}
        stats["AR100"] = mean_defined(scores.recall_SKTN[..., 2])
        for letter, areas in AREA_RANGES.items():
            of_size = weighted_scores(self.matches_of(areas), self._as_it_is())
            stats[f"AP{letter}"] = mean_defined(of_size.ap_SKT)
            stats[f"AR{letter}"] = mean_defined(of_size.recall_SKTN[..., 2])
        names = [category.name for category in self.labels.categories]
        per_category = dict(zip(names, map(defined, scores.by_category()[0].tolist()), strict=True))
        return VideoMetrics(**{name: defined(value) for name, value in stats.items()}, per_category=per_category)

    def _as_it_is(self) -> FloatArray:
        return np.ones((1, len(self.labels.videos)))

    def _category_matches(self, category_id: int, areas: AreaRange) -> CategoryMatches:
        limit, num_thresholds = MAX_DETECTIONS[-1], len(self._coco.params.iouThrs)
        found, objects_V = [], np.zeros(len(self.labels.videos), dtype=np.int64)
        for row, video in enumerate(self.labels.videos):
            matched = self._coco.evaluateImg(video.id, category_id, list(areas), limit)
            if matched is not None:
                found.append((row, matched))
                objects_V[row] = int((np.asarray(matched["gtIgnore"]) == 0).sum())
        empty_T0 = np.zeros((num_thresholds, 0))
        scores = np.concatenate([[], *(matched["dtScores"] for _, matched in found)])
        order = np.argsort(-scores, kind="stable")
        counts = [len(matched["dtIds"]) for _, matched in found]
        return CategoryMatches(
            found_D=np.concatenate([[], *(matched["dtIds"] for _, matched in found)]).astype(np.int64)[order] - 1,
            score_D=scores[order],
            video_D=np.repeat([row for row, _ in found], counts).astype(np.int64)[order],
            rank_D=np.concatenate([[], *map(np.arange, counts)]).astype(np.int64)[order],
            object_TD=np.hstack([empty_T0, *(m["dtMatches"] for _, m in found)]).astype(np.int64)[:, order] - 1,
            counted_TD=~np.hstack([empty_T0, *(m["dtIgnore"] for _, m in found)]).astype(bool)[:, order],
            objects_V=objects_V,
        )


def evaluate_tracks(labels: Labels, predictions: Sequence[TrackPrediction]) -> VideoMetrics:
    """Score predictions against labels; see VideoEvaluation."""
    return VideoEvaluation(labels, predictions).metrics()


class _TrackEval(COCOeval):  # type: ignore[misc]  # pycocotools has no types.
    """Stock COCOeval but for the IoU of two tracks; ready for `evaluateImg` of any video, category and area range."""

    def __init__(self, ground_truth: COCO, detections: COCO) -> None:
        super().__init__(ground_truth, detections, iouType="segm")
        self.params.maxDets = list(MAX_DETECTIONS)
        self._prepare()
        pairs = itertools.product(self.params.imgIds, self.params.catIds)
        self.ious = {(video, category): self.computeIoU(video, category) for video, category in pairs}

    def computeIoU(self, imgId: int, catId: int) -> FloatArray:  # noqa: N802  # pycocotools' name.
        """IoUs (D, G) of one video and category, detections by descending score."""
        found = sorted(self._dts[imgId, catId], key=lambda track: -track["score"])[: self.params.maxDets[-1]]
        masks_of = [[track["segmentation"]["counts"] for track in side] for side in (found, self._gts[imgId, catId])]
        return track_ious(*masks_of)


def _ground_truth(labels: Labels, joined: Sequence[TrackMasks]) -> COCO:
    return _coco(
        labels,
        [
            {
                "id": number,
                "image_id": track.video_id,
                "category_id": track.category_id,
                "iscrowd": int(track.iscrowd),
                "area": mean_area(track.areas),
                "segmentation": {"counts": masks},  # COCOeval hands through any `counts` that are no list.
            }
            for number, (track, masks) in enumerate(zip(labels.tracks, joined, strict=True), start=1)  # 0: "no match"
        ],
    )


def _detections(labels: Labels, predictions: Sequence[TrackPrediction], joined: Sequence[TrackMasks]) -> COCO:
    return _coco(
        labels,
        [
            {
                "id": number,
                "image_id": track.video_id,
                "category_id": track.category_id,
                "score": track.score,
                "area": mean_area(mask_areas(track.segmentations)),
                "segmentation": {"counts": masks},
            }
            for number, (track, masks) in enumerate(zip(predictions, joined, strict=True), start=1)
        ],
    )


def _video_of(track: TrackPrediction, labels: Labels) -> Video:
    """The video of a prediction, which must fit it: COCOeval would drop or misread it in silence."""
    where = f"prediction for video {track.video_id}"
    video = labels.video_by_id.get(track.video_id)
    if video is None or track.category_id not in labels.category_index:
        got = f"video {track.video_id}, category {track.category_id}"
        raise AnnotationError("unknown video or category", where=where, expected="ids of the labels", got=got)
    sizes = {(rle.height, rle.width) for rle in track.segmentations if rle is not None}
    if len(track.segmentations) != video.length or sizes - {(video.height, video.width)}:
        expected = f"{video.length} masks of {video.height} x {video.width}"
        got = f"{len(track.segmentations)} masks of {sorted(sizes)}"
        raise AnnotationError("the masks do not fit the video", where=where, expected=expected, got=got)
    if not math.isfinite(track.score):
        raise AnnotationError("a score is not finite", where=where, got=track.score)
    return video


def _coco(labels: Labels, annotations: list[dict[str, object]]) -> COCO:
    """A COCO data set whose images are the videos."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": video.id, "height": video.height, "width": video.width} for video in labels.videos],
        "categories": [{"id": category.id, "name": category.name} for category in labels.categories],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # It prints its progress.
        coco.createIndex()
    return coco


def mean_area(areas: Sequence[float]) -> float:
    """Mean over the frames where the object is seen; 0 for an object never seen."""
    seen = [area for area in areas if area > 0]
    return sum(seen) / len(seen) if seen else 0.0


def defined(value: float) -> float | None:
    """None for NaN, which stands for nothing to find."""
    return None if math.isnan(value) else value


def mean_defined(values: FloatArray) -> float:
    """Mean without NaN; NaN where nothing is left."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else math.nan
