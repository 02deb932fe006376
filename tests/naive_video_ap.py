"""Video AP and AR by the definition, per pixel and with plain loops: the reference of test_metrics.py.

Written from the definition (video IoU and the COCO rules for crowds and ignored objects), it
shares nothing with the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0.0, 1.0, 101).tolist()
AREAS = {"": (0, 1e10), "s": (0, 128**2), "m": (128**2, 256**2), "l": (256**2, 1e10)}


@dataclass(frozen=True, kw_only=True)
class Object:
    """A track (T, h, w) of either side; `scale` is the edge of a cell in pixels, `score` None for labels."""

    video: int
    category: int
    cells: NDArray[np.bool_]
    scale: int
    crowd: bool = False
    score: float | None = None

    @property
    def area(self) -> float:
        """Mean pixels over the frames that show it."""
        per_frame = [int(frame.sum()) * self.scale**2 for frame in self.cells if frame.any()]
        return sum(per_frame) / len(per_frame) if per_frame else 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One detection at one threshold and area range."""

    score: float
    hit: bool


def iou(found: Object, label: Object) -> float:
    intersection = union = 0
    for left, right in zip(found.cells.ravel().tolist(), label.cells.ravel().tolist(), strict=True):
        intersection += left and right
        union += left if label.crowd else (left or right)
    return intersection / union if union else 0.0


def match(
    found: list[Object], labels: list[Object], threshold: float, area: tuple[float, float]
) -> tuple[list[Outcome], int]:
    """Greedy by score: (counted detections, number of objects to find) of one video and category."""

    def inside(item: Object) -> bool:
        return area[0] <= item.area <= area[1]

    wanted = [label for label in labels if inside(label) and not label.crowd]
    ignored = [label for label in labels if not inside(label) or label.crowd]
    taken: list[Object] = []
    outcomes = []
    for item in found:
        hit = None
        for group in (wanted, ignored):
            free = [label for label in group if label.crowd or not any(label is other for other in taken)]
            good = [(iou(item, label), index) for index, label in enumerate(free) if iou(item, label) >= threshold]
            if good and hit is None:
                hit = free[max(good)[1]]  # Of equal overlaps COCO takes the last.
        if hit is not None:
            taken.append(hit)
        if any(hit is label for label in wanted) or (hit is None and inside(item)):
            assert item.score is not None
            outcomes.append(Outcome(score=item.score, hit=hit is not None))
    return outcomes, len(wanted)


def average(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def curves(
    videos: list[int], objects: list[Object], category: int, threshold: float, area: str, limit: int
) -> tuple[float, float] | None:
    """(interpolated precision, recall) of one category, or None where there is nothing to find."""
    outcomes: list[Outcome] = []
    num_wanted = 0
    for video in videos:
        here = [item for item in objects if (item.video, item.category) == (video, category)]
        found = sorted((item for item in here if item.score is not None), key=lambda item: -(item.score or 0))
        labels = [item for item in here if item.score is None]
        counted, wanted = match(found[:limit], labels, threshold, AREAS[area])
        outcomes += counted
        num_wanted += wanted
    if num_wanted == 0:
        return None
    outcomes.sort(key=lambda outcome: -outcome.score)
    points = []
    for rank in range(1, len(outcomes) + 1):
        hits = sum(outcome.hit for outcome in outcomes[:rank])
        points.append((hits / num_wanted, hits / rank))
    precisions = [max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS]
    return sum(precisions) / len(precisions), points[-1][0] if points else 0.0


def naive_metrics(videos: list[int], categories: list[int], objects: list[Object]) -> dict[str, float | None]:
    """The 12 numbers and `AP of c` per category, None where undefined."""

    def mean(which: int, thresholds: list[float], area: str = "", limit: int = 100) -> float | None:
        values = [curves(videos, objects, c, t, area, limit) for c in categories for t in thresholds]
        return average([pair[which] for pair in values if pair is not None])

    stats = {"AP": mean(0, THRESHOLDS), "AP50": mean(0, [0.5]), "AP75": mean(0, [THRESHOLDS[5]])}
    stats |= {f"AP{area}": mean(0, THRESHOLDS, area) for area in "sml"}
    stats |= {f"AR{limit}": mean(1, THRESHOLDS, limit=limit) for limit in (1, 10, 100)}
    stats |= {f"AR{area}": mean(1, THRESHOLDS, area) for area in "sml"}
    for category in categories:
        pairs = [curves(videos, objects, category, t, "", 100) for t in THRESHOLDS]
        stats[f"AP of {category}"] = average([pair[0] for pair in pairs if pair is not None])
    return stats
