"""Average precision and recall of tracks, as YouTube-VIS and OVIS define them (REFERENCE section 8).

The video IoU of two tracks is the sum over frames of their intersections over the sum of their unions.
The masks of a video, side by side, are one mask; so stock pycocotools intersects tracks, and its COCOeval
matches them and accumulates AP and AR, once it is told the tracks' areas and the benchmark's area ranges.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cache import masks
from cache.errors import AnnotationError
from cache.labels import Labels, Video, mask_areas
from cache.masks import Rle
from evaluate.results import TrackPrediction

FloatArray = NDArray[np.float64]

_ALL_AREAS = [0.0, 1e10]
AREA_RANGES = (_ALL_AREAS, [0.0, 128.0**2], [128.0**2, 256.0**2], [256.0**2, 1e10])
MAX_DETECTIONS = (1, 10, 100)


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
    """Predictions matched to the labels once; metrics can then be read for any draw of videos."""

    def __init__(self, labels: Labels, predictions: Sequence[TrackPrediction]) -> None:
        """Match; AnnotationError where the labels have no tracks or a prediction does not fit its video."""
        if not labels.has_tracks:
            raise AnnotationError(
                "the label file has no annotations to score against",
                hint="Score on a labelled split, e.g. a part of train that was held out.",
            )
        self.labels = labels
        with _quiet():
            self._coco = _TrackEval(_ground_truth(labels), _detections(labels, predictions))
            self._coco.evaluate()

    @property
    def ious(self) -> dict[tuple[int, int], FloatArray]:
        """Video IoUs by (video id, category id), (D, G): by descending score; labels in file order."""
        return {(int(video), int(category)): ious for (video, category), ious in self._coco.ious.items()}

    def metrics(self) -> VideoMetrics:
        """The 12 numbers and the AP of every category."""
        with _quiet():
            self._coco.accumulate()
            self._coco.summarize()
        names = [name for name in VideoMetrics.__dataclass_fields__ if name != "per_category"]
        stats = {name: _defined(value) for name, value in zip(names, self._coco.stats.tolist(), strict=True)}
        precision: FloatArray = self._coco.eval["precision"][:, :, :, 0, -1]
        categories = self.labels.categories
        per_category = {c.name: _mean_defined(precision[:, :, k]) for k, c in enumerate(categories)}
        return VideoMetrics(**stats, per_category=per_category)

    def average_precision(self, video_ids: Iterable[int]) -> float | None:
        """AP of a draw of videos; one drawn twice counts twice (for the bootstrap over videos)."""
        row = {int(video): index for index, video in enumerate(self._coco.params.imgIds)}
        drawn = [row[video] for video in video_ids]
        stride = len(row)
        rows_per_category = stride * len(AREA_RANGES)  # COCOeval lists categories x area ranges x videos.
        sample = _TrackEval()
        sample.params.imgIds, sample.params.catIds = list(range(len(drawn))), self._coco.params.catIds
        sample.params.areaRng, sample.params.maxDets = [_ALL_AREAS], [MAX_DETECTIONS[-1]]
        sample._paramsEval = sample.params
        first_rows = range(0, len(self._coco.evalImgs), rows_per_category)
        sample.evalImgs = [self._coco.evalImgs[first + index] for first in first_rows for index in drawn]
        with _quiet():
            sample.accumulate()
        return _mean_defined(sample.eval["precision"])


def evaluate_tracks(labels: Labels, predictions: Sequence[TrackPrediction]) -> VideoMetrics:
    """Score predictions against labels; see VideoEvaluation."""
    return VideoEvaluation(labels, predictions).metrics()


def video_ious(labels: Labels, predictions: Sequence[TrackPrediction]) -> dict[tuple[int, int], FloatArray]:
    """Video IoUs by (video id, category id); see VideoEvaluation.ious."""
    return VideoEvaluation(labels, predictions).ious


class _TrackEval(COCOeval):  # type: ignore[misc]  # pycocotools has no types.
    """Stock COCOeval but for the IoU of two tracks, each given as the masks of chunks of its video."""

    def __init__(self, ground_truth: COCO | None = None, detections: COCO | None = None) -> None:
        super().__init__(ground_truth, detections, iouType="segm")
        self.params.areaRng = [list(bounds) for bounds in AREA_RANGES]
        self.params.maxDets = list(MAX_DETECTIONS)

    def computeIoU(self, imgId: int, catId: int) -> FloatArray:  # noqa: N802  # pycocotools' name.
        """IoUs (D, G) of one video and category, detections by descending score; for crowds over D's area."""
        tracks = self._gts[imgId, catId]
        found = sorted(self._dts[imgId, catId], key=lambda track: -track["score"])[: self.params.maxDets[-1]]
        intersections = np.zeros((len(found), len(tracks)))
        if not intersections.size:
            return intersections
        found_chunks = zip(*(track["segmentation"]["counts"] for track in found), strict=True)
        track_chunks = zip(*(track["segmentation"]["counts"] for track in tracks), strict=True)
        for left, right in zip(found_chunks, track_chunks, strict=True):
            # Against a crowd pycocotools divides by D's area alone: times that area, rounded, the
            # intersection is exact, and chunks of one video can be added up.
            over_found = coco_mask.iou(list(left), list(right), [1] * len(tracks))
            intersections += np.rint(over_found * coco_mask.area(list(left))[:, None])
        found_areas = np.array([[track["pixels"]] for track in found])
        track_areas = np.array([[track["pixels"] for track in tracks]])
        crowd = np.array([[bool(track["iscrowd"]) for track in tracks]])
        unions = np.where(crowd, found_areas, found_areas + track_areas - intersections)
        return intersections / np.maximum(unions, 1)


def _ground_truth(labels: Labels) -> COCO:
    annotations = []
    for number, track in enumerate(labels.tracks, start=1):  # COCOeval takes id 0 for "no match".
        video = labels.video_by_id[track.video_id]
        annotations.append(
            {
                "id": number,
                "image_id": track.video_id,
                "category_id": track.category_id,
                "iscrowd": int(track.iscrowd),
                "area": _mean_area(track.areas),
                **_chunked(track.segmentations, video),
            }
        )
    return _coco(labels, annotations)


def _detections(labels: Labels, predictions: Sequence[TrackPrediction]) -> COCO:
    annotations = []
    for number, track in enumerate(predictions, start=1):
        annotations.append(
            {
                "id": number,
                "image_id": track.video_id,
                "category_id": track.category_id,
                "score": track.score,
                "area": _mean_area(mask_areas(track.segmentations)),
                **_chunked(track.segmentations, _video_of(track, labels)),
            }
        )
    return _coco(labels, annotations)


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
    coco.createIndex()
    return coco


def _chunked(segmentations: Sequence[Rle | None], video: Video) -> dict[str, object]:
    """The masks of a track, side by side in chunks that pycocotools can hold (one chunk for most videos)."""
    frames = max(1, masks.MAX_PIXELS // (video.height * video.width))
    chunks = [
        masks.side_by_side(segmentations[start : start + frames], video.height, video.width).to_json()
        for start in range(0, video.length, frames)
    ]
    # COCOeval hands through any `counts` that are no list.
    return {"segmentation": {"counts": tuple(chunks)}, "pixels": int(coco_mask.area(chunks).sum())}


def _mean_area(areas: Sequence[float]) -> float:
    """Mean over the frames where the object is seen; 0 for an object never seen."""
    seen = [area for area in areas if area > 0]
    return sum(seen) / len(seen) if seen else 0.0


def _mean_defined(values: FloatArray) -> float | None:
    """Mean without the entries that pycocotools marks as undefined (-1)."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _defined(value: float) -> float | None:
    return None if value == -1 else value


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """COCOeval prints its progress and a table of its own."""
    return contextlib.redirect_stdout(io.StringIO())
