"""Intervals against the binomial distribution, resamples against the naive AP, parts of a split by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from cache.labels import masks
from cache.labels.tracks import Labels
from evaluate.metrics.bootstrap import Interval, draw_weights, paired_difference
from evaluate.metrics.breakdown import parts_of, thirds
from evaluate.metrics.occlusion import box_occlusion, occlusion_rate
from evaluate.metrics.video_ap import VideoEvaluation
from evaluate.metrics.weighted import FloatArray
from tests.naive_video_ap import Object, naive_metrics
from tests.track_samples import CATEGORIES, as_files_have_it

ONE = np.ones((1, 1, 1), dtype=bool)


def average_precisions(found: int, weights: FloatArray) -> FloatArray:
    """AP of a run that finds the objects of the first of 101 videos, one in each, and says nothing else.

    A draw that finds h of 101 has recall h/101 at precision 1, which passes h of the 101 recalls that COCO reads.
    """
    objects = [Object(video=v, category=3, cells=ONE, scale=1) for v in range(101)]
    objects += [Object(video=v, category=3, cells=ONE, scale=1, score=1 - v / 1000) for v in range(found)]
    evaluation = VideoEvaluation(*as_files_have_it(list(range(101)), objects))
    return evaluation.scores(np.vstack([np.ones((1, 101)), weights])).headline()["AP"]


def test_intervals_are_those_of_the_binomial_distribution() -> None:
    weights = draw_weights(101, 2000)
    some, every = average_precisions(70, weights), average_precisions(101, weights)
    assert some[0] == pytest.approx(70 / 101) and every.tolist() == pytest.approx([1.0] * 2001)
    interval = Interval.of(some)
    wanted = binom.ppf([0.025, 0.975], 101, 70 / 101) / 101
    assert [interval.low, interval.high] == pytest.approx(wanted.tolist(), abs=0.011)  # one video more or less
    difference = paired_difference(some, every)
    assert difference.interval.value == pytest.approx(-31 / 101)
    assert [difference.interval.low, difference.interval.high] == pytest.approx([*(wanted - 1)], abs=0.011)
    assert difference.p == pytest.approx(2 / 2001)  # no draw of 2,000 comes out even


def test_pairing_takes_out_what_both_sides_share() -> None:
    # The second run loses 3 of the 70 videos of the first: a difference of Binomial(101, 3/101) videos, while the
    # intervals of the two sides, some 18 videos wide, overlap.
    weights = draw_weights(101, 2000)
    first, second = average_precisions(70, weights), average_precisions(67, weights)
    difference = paired_difference(second, first)
    wanted = -binom.ppf([0.975, 0.025], 101, 3 / 101) / 101
    assert [difference.interval.low, difference.interval.high] == pytest.approx(wanted.tolist(), abs=0.011)
    # On the rarer side of zero lie the draws with none of the three.
    assert difference.p == pytest.approx(2 * (98 / 101) ** 101, abs=0.03)
    same = paired_difference(first, first)
    assert (same.interval.low, same.interval.high, same.p) == (0.0, 0.0, 1.0)


def test_draws_repeat_by_seed_and_hold_as_many_videos_as_the_split() -> None:
    weights = draw_weights(7, 50, seed=3)
    assert weights.shape == (50, 7) and set(weights.sum(axis=1)) == {7.0}
    assert np.array_equal(weights, draw_weights(7, 50, seed=3))
    assert not np.array_equal(weights, draw_weights(7, 50, seed=4))


def test_what_is_undefined_has_no_interval() -> None:
    nothing = np.array([np.nan, np.nan, np.nan])
    assert Interval.of(nothing) == Interval(value=None, low=None, high=None)
    assert paired_difference(nothing, nothing).p is None


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 8)] * 2), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_box_occlusion_counts_pixels_under_two_boxes(boxes: list[tuple[int, int, int, int]]) -> None:
    covered = np.zeros((20, 20), dtype=int)
    for x, y, width, height in boxes:
        covered[y : y + height, x : x + width] += 1
    assert box_occlusion(np.array(boxes, dtype=float)) == pytest.approx((covered > 1).sum() / (covered > 0).sum())


def _two_videos() -> tuple[Labels, list[Object]]:
    """Video 2 (1 frame): two objects side by side. Video 5 (2 frames): two that overlap by half in one frame."""
    left, right = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
    left[..., :2], right[..., 2:] = True, True
    whole, half = np.ones((2, 1, 4), dtype=bool), np.zeros((2, 1, 4), dtype=bool)
    half[0, :, :2] = True
    objects = [
        Object(video=2, category=3, cells=left, scale=1),
        Object(video=2, category=8, cells=right, scale=1),
        Object(video=5, category=3, cells=whole, scale=1),
        Object(video=5, category=3, cells=half, scale=1),
        Object(video=2, category=3, cells=left, scale=1, score=0.9),
        Object(video=5, category=3, cells=whole, scale=1, score=0.8),
        Object(video=5, category=8, cells=half, scale=1, score=0.7),
    ]
    return as_files_have_it([2, 5], objects)[0], objects


def test_parts_hold_the_right_videos_and_objects() -> None:
    labels, objects = _two_videos()
    assert occlusion_rate(labels, 2) == 0.0
    assert occlusion_rate(labels, 5) == pytest.approx((0.5 + 0.0) / 2)
    parts = {(part.kind, part.name): part for part in parts_of(labels)}
    assert [(name, part.num_objects) for (kind, name), part in parts.items() if kind == "category"] == [
        ("c3", 3), ("c8", 1),
    ]  # fmt: skip
    assert parts["video length", "1 frames"].videos == {2} and parts["video length", "2 frames"].videos == {5}
    assert parts["occlusion (mBOR)", "25.0 %"].videos == {5}
    evaluation = VideoEvaluation(*as_files_have_it([2, 5], objects))
    for (_, name), videos in {("video length", "1 frames"): [2], ("video length", "2 frames"): [5]}.items():
        naive = naive_metrics(videos, CATEGORIES, objects)["AP"]
        measured = parts["video length", name].average_precision(evaluation, np.ones((1, 2)))
        assert measured.tolist() == pytest.approx([naive])


def test_objects_of_other_occlusion_levels_are_ignored() -> None:
    labels, objects = _two_videos()
    levels = [("none",), ("severe",), ("none", "none"), (None, "severe")]
    tracks = [dataclasses.replace(t, occlusion=level) for t, level in zip(labels.tracks, levels, strict=True)]
    labelled = dataclasses.replace(labels, tracks=tuple(tracks))
    parts = {part.name: part for part in parts_of(labelled) if part.kind == "occlusion (as labelled)"}
    assert {name: part.objects for name, part in parts.items()} == {"none": {0, 2}, "severe": {1, 3}}
    predictions = as_files_have_it([2, 5], objects)[1]
    evaluation = VideoEvaluation(labelled, predictions)
    # Both objects without occlusion are found; the track of category 8 has none to find and counts nowhere.
    assert parts["none"].average_precision(evaluation, np.ones((1, 2))).tolist() == [1.0]
    # Category 3's tracks find objects that are ignored here; its severe one, and category 8's, are not found.
    assert parts["severe"].average_precision(evaluation, np.ones((1, 2))).tolist() == [0.0]
    assert VideoEvaluation(labelled, predictions).metrics() == evaluation.metrics()


def test_crowds_are_in_no_part() -> None:
    labels, objects = _two_videos()
    crowd = Object(video=2, category=8, cells=np.ones((1, 1, 4), dtype=bool), scale=300, crowd=True)
    with_crowd = as_files_have_it([2, 5], [*objects, crowd])[0]
    levels = [("none",), ("severe",), ("none", "none"), ("none", "severe"), ("slight",)]

    def named(labels: Labels) -> list[tuple[str, str, int]]:
        tracks = [dataclasses.replace(t, occlusion=level) for t, level in zip(labels.tracks, levels, strict=False)]
        parts = parts_of(dataclasses.replace(labels, tracks=tuple(tracks)))
        return [(p.kind, p.name, p.num_objects) for p in parts if p.kind != "occlusion (mBOR)"]  # of boxes, crowds too

    assert len(with_crowd.tracks) == len(labels.tracks) + 1
    assert named(with_crowd) == named(labels)


def test_thirds_are_even_and_keep_equal_values_together() -> None:
    assert thirds([1, 2, 3, 4, 5, 6]) == [(1, 2), (3, 4), (5, 6)]
    assert thirds([7, 7, 7, 7]) == [(7, 7)]
    assert thirds([1, 1, 1, 1, 9]) == [(1, 1), (9, 9)]
    assert thirds([]) == []


def test_sizes_cut_the_objects_by_their_mean_area() -> None:
    cells = [np.arange(16).reshape(1, 4, 4) < area for area in (1, 2, 4, 8, 12, 16)]
    labels, _ = as_files_have_it([2], [Object(video=2, category=3, cells=c, scale=1) for c in cells])
    sizes = [part for part in parts_of(labels) if part.name.startswith("a third")]
    assert [(part.areas, part.num_objects) for part in sizes] == [((1, 2), 2), ((4, 8), 2), ((12, 16), 2)]
    assert masks.areas([track.segmentations[0] for track in labels.tracks]).tolist() == [1, 2, 4, 8, 12, 16]  # type: ignore[list-item]
