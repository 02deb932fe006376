"""Error types and what mending them gains, each worked by hand on a video of one frame of 1 x 40 pixels."""

from __future__ import annotations

import numpy as np
import pytest

from evaluate.metrics.error_types import ErrorAnalysis, ErrorType, analyse_errors
from evaluate.metrics.video_ap import VideoEvaluation
from tests.naive_video_ap import Object
from tests.track_samples import as_files_have_it

TWO_OF_THREE = 50 / 101 * (1 - 2 / 3)
"""Hit, false alarm, hit: recalls 0 to 0.50 at precision 1, the 50 above at 2/3; without the false alarm AP is 1."""


def strip(category: int, start: int, stop: int, score: float | None = None, *, crowd: bool = False) -> Object:
    """A track over the pixels [start, stop) of the only frame."""
    cells = np.zeros((1, 1, 40), dtype=bool)
    cells[..., start:stop] = True
    return Object(video=2, category=category, cells=cells, scale=1, score=score, crowd=crowd)


def analysed(*objects: Object) -> ErrorAnalysis:
    return analyse_errors(VideoEvaluation(*as_files_have_it([2], list(objects))))


CASES = {
    # Category 3 goes from AP 0 to 1, at every threshold; category 8 stays at 0.
    ErrorType.localised: ([strip(3, 0, 10), strip(8, 10, 20), strip(3, 0, 4, 0.9)], 0.5, 0.5, {ErrorType.missed: 1}),
    ErrorType.misclassified: ([strip(3, 0, 10), strip(8, 0, 10, 0.9)], 1.0, 1.0, {}),
    ErrorType.duplicate: (
        [strip(3, 0, 10), strip(3, 10, 20), strip(3, 0, 10, 0.9), strip(3, 0, 10, 0.8), strip(3, 10, 20, 0.7)],
        TWO_OF_THREE, TWO_OF_THREE, {},
    ),
    ErrorType.background: (
        [strip(3, 0, 10), strip(3, 10, 20), strip(3, 0, 10, 0.9), strip(3, 30, 40, 0.8), strip(3, 10, 20, 0.7)],
        TWO_OF_THREE, TWO_OF_THREE, {},
    ),
    # The false alarm of category 8 stands above its only hit: 1/2 becomes 1, in one of two categories.
    ErrorType.both: (
        [strip(3, 0, 10), strip(8, 10, 20), strip(8, 0, 4, 0.9), strip(8, 10, 20, 0.8)],
        0.25, 0.25, {ErrorType.missed: 1},
    ),
    # Half the objects are found, without a false alarm: recalls 0 to 0.50 of 101.
    ErrorType.missed: ([strip(3, 0, 10), strip(3, 20, 30), strip(3, 0, 10, 0.9)], 50 / 101, 50 / 101, {}),
}  # fmt: skip


@pytest.mark.parametrize("error", CASES)
def test_each_type_alone(error: ErrorType) -> None:
    objects, gain_ap50, gain_ap, others = CASES[error]
    weights = analysed(*objects).weights
    assert {kind: weight.count for kind, weight in weights.items() if weight.count} == {error: 1, **others}
    assert weights[error].gain_ap50 == pytest.approx(gain_ap50)
    assert weights[error].gain_ap == pytest.approx(gain_ap)
    absent = [weight for kind, weight in weights.items() if kind is not error and kind not in others]
    assert all(weight.gain_ap50 == 0 for weight in absent)


def test_types_are_sorted_out_anew_at_each_threshold() -> None:
    # IoU 8/10: a hit up to the threshold 0.80, badly localised at the three above.
    analysis = analysed(strip(3, 0, 10), strip(3, 0, 8, 0.9))
    assert all(weight.count == 0 for weight in analysis.weights.values())
    assert analysis.weights[ErrorType.localised].gain_ap50 == 0
    assert analysis.weights[ErrorType.localised].gain_ap == pytest.approx(0.3)


def test_of_two_mended_tracks_of_one_object_the_better_finds_it_and_the_other_goes() -> None:
    analysis = analysed(strip(3, 0, 10), strip(3, 0, 4, 0.9), strip(3, 0, 3, 0.8))
    assert analysis.weights[ErrorType.localised].count == 2
    assert analysis.weights[ErrorType.localised].gain_ap50 == pytest.approx(1.0)
    # Where the object is found already, both go: the hit moves from rank 3 (precision 1/3) to rank 1.
    found = analysed(strip(3, 0, 10), strip(3, 0, 4, 0.9), strip(3, 0, 3, 0.8), strip(3, 0, 10, 0.7))
    assert found.weights[ErrorType.localised].gain_ap50 == pytest.approx(2 / 3)


def test_false_alarms_are_listed_best_first_and_crowds_are_no_errors() -> None:
    crowd = [strip(8, 20, 40, crowd=True), strip(8, 20, 30, 0.9)]
    analysis = analysed(strip(3, 0, 10), strip(3, 12, 16, 0.5), strip(8, 0, 10, 0.7), *crowd)
    assert list(analysis.false_alarms.items()) == [(1, ErrorType.misclassified), (0, ErrorType.background)]
    assert analysis.missed == ()
