"""Video AP/AR against the original evaluator's numbers and against a naive per-pixel implementation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.errors import AnnotationError
from cache.labels import masks
from cache.labels.annotations import load_labels
from cache.labels.tracks import Category, Labels, Track, mask_areas
from evaluate import score
from evaluate.metrics.video_ap import VideoEvaluation, VideoMetrics, evaluate_tracks
from evaluate.results import TrackPrediction, load_results
from tests.naive_video_ap import Object, iou, naive_metrics
from tests.track_samples import CATEGORIES, as_files_have_it, video_of

GOLDEN = Path(__file__).parent / "golden" / "ytvis_eval"
Cells = NDArray[np.bool_]


@pytest.fixture(scope="module")
def golden() -> VideoEvaluation:
    labels = load_labels(GOLDEN / "gt.json")
    return VideoEvaluation(labels, load_results(GOLDEN / "results.json", labels))


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, object]]:
    content: dict[str, dict[str, object]] = json.loads((GOLDEN / "expected.json").read_text())
    return content


def test_golden_stats(golden: VideoEvaluation, expected: dict[str, dict[str, float]]) -> None:
    measured = golden.metrics().to_json()
    assert len(expected["stats"]) == 12
    for name, value in expected["stats"].items():
        assert measured[name] == (None if value == -1 else pytest.approx(value, rel=0, abs=1e-9)), name
    per_category = {f"c{number}": value for number, value in expected["AP_per_category"].items()}
    assert measured["per_category"] == pytest.approx(per_category, rel=0, abs=1e-9)


def test_golden_video_ious(golden: VideoEvaluation, expected: dict[str, dict[str, list[list[float]]]]) -> None:
    assert {key for key, ious in golden._coco.ious.items() if ious.size} == {
        tuple(map(int, key.split(","))) for key, rows in expected["ious"].items() if np.size(rows)
    }
    for key, rows in expected["ious"].items():
        video, category = map(int, key.split(","))
        if np.size(rows):
            np.testing.assert_allclose(golden._coco.ious[video, category], rows, rtol=0, atol=1e-9)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[int], list[Object]]:
    """Videos of different lengths and sizes; labels and predictions that overlap, tie and go missing.

    A cell is 1 pixel, or 128 so that areas fall on and around the limits of small, medium and large.
    """
    videos = [2, 5, 9, 14][: draw(st.integers(1, 4))]
    scale = draw(st.sampled_from([1, 128]))
    objects: list[Object] = []
    for video in videos:
        shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4)))
        size = int(np.prod(shape))
        bits = st.just(0) | st.just(2**size - 1) | st.integers(0, 2**size - 1)
        pool = draw(st.lists(bits, min_size=1, max_size=3))  # Shared masks: exact hits and tied overlaps.
        for is_label in draw(st.lists(st.booleans(), max_size=7)):
            value = draw(st.sampled_from(pool) | bits)
            flat = [(value >> position) % 2 == 1 for position in range(size)]
            objects.append(
                Object(
                    video=video,
                    category=draw(st.sampled_from(CATEGORIES)),
                    cells=np.array(flat).reshape(shape),
                    scale=scale,
                    crowd=is_label and draw(st.integers(0, 3)) == 0,
                    score=None if is_label else draw(st.sampled_from([0.25, 0.5, 0.75])),
                )
            )
        if draw(st.booleans()):
            # So that every video has a size, an object never seen.
            objects.append(Object(video=video, category=3, cells=np.zeros(shape, bool), scale=scale))
    return videos, objects


def _assert_equal(metrics: VideoMetrics, naive: dict[str, float | None]) -> None:
    measured = metrics.to_json()
    per_category = measured.pop("per_category")
    assert isinstance(per_category, dict)
    measured |= {f"AP of {name[1:]}": value for name, value in per_category.items()}
    assert measured.keys() == naive.keys()
    for name, value in naive.items():
        assert measured[name] == (None if value is None else pytest.approx(value, rel=0, abs=1e-9)), name


@given(scenes(), st.integers(1, 3))
@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_metrics_equal_the_naive_ones(scene: tuple[list[int], list[Object]], frames_per_chunk: int) -> None:
    videos, objects = scene
    labels, predictions = as_files_have_it(videos, objects)
    largest = max(video.height * video.width for video in labels.videos)
    with pytest.MonkeyPatch.context() as patch:
        # Videos too long for one mask are cut in chunks of frames.
        patch.setattr(masks, "MAX_PIXELS", frames_per_chunk * largest)
        evaluation = VideoEvaluation(labels, predictions)
    _assert_equal(evaluation.metrics(), naive_metrics(videos, CATEGORIES, objects))
    for (video, category), ious in evaluation._coco.ious.items():
        here = [item for item in objects if (item.video, item.category) == (video, category)]
        found = sorted((item for item in here if item.score is not None), key=lambda item: -(item.score or 0))
        pairs = [[iou(item, label) for label in here if label.score is None] for item in found]
        assert ious.tolist() == (pairs if ious.size else ious.tolist())
        assert ious.size == sum(map(len, pairs))


@given(scenes(), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_video_of_weight_two_counts_as_two_copies_of_it(
    scene: tuple[list[int], list[Object]], data: st.DataObject
) -> None:
    videos, objects = scene
    # Distinct scores: tied ones have no order of their own.
    objects = [
        item if item.score is None else dataclasses.replace(item, score=item.score - 1e-4 * number)
        for number, item in enumerate(objects)
    ]
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(videos), max_size=len(videos)).filter(any))
    drawn = [video for video, weight in zip(videos, weights, strict=True) for _ in range(weight)]
    copies = [
        dataclasses.replace(item, video=number)
        for number, video in enumerate(drawn)
        for item in objects
        if item.video == video
    ]
    evaluation = VideoEvaluation(*as_files_have_it(videos, objects))
    scores = evaluation.scores(np.array([[1] * len(videos), weights], dtype=float))
    measured = {name: values[1] for name, values in scores.headline().items()}
    for category, value in zip(CATEGORIES, scores.by_category()[1].tolist(), strict=True):
        measured[f"AP of {category}"] = value
    naive = naive_metrics(list(range(len(drawn))), CATEGORIES, copies)
    for name, value in measured.items():
        wanted = naive[name]
        assert value == pytest.approx(math.nan if wanted is None else wanted, abs=1e-9, nan_ok=True), name


def test_hand_worked_ap() -> None:
    # Two frames of 1 x 4. Prediction 1: 3 of 4 pixels in frame 0, nothing in frame 1, where the object has 2:
    # IoU 3/6 = 0.5, a hit at the threshold 0.50 alone. A worse one with a lower score changes nothing.
    label = np.array([[[1, 1, 1, 1]], [[1, 1, 0, 0]]], dtype=bool)
    first = np.array([[[1, 1, 1, 0]], [[0, 0, 0, 0]]], dtype=bool)
    objects = [
        Object(video=2, category=3, cells=label, scale=1),
        Object(video=2, category=3, cells=first, scale=1, score=0.9),
        Object(video=2, category=3, cells=~label, scale=1, score=0.1),
    ]
    labels, predictions = as_files_have_it([2], objects)
    metrics = evaluate_tracks(labels, predictions)
    assert VideoEvaluation(labels, predictions)._coco.ious[2, 3].tolist() == [[0.5], [0.0]]
    numbers = [metrics.AP, metrics.AP50, metrics.AP75, metrics.AR1]
    assert numbers == pytest.approx([0.1, 1.0, 0.0, 0.1])
    assert metrics.APl is None
    assert metrics.per_category == {"c3": pytest.approx(0.1), "c8": None}


def test_a_long_video_whose_object_comes_back() -> None:
    # 622 million pixels: as one mask pycocotools misreads the run between the two frames, and never ends.
    mask = np.zeros((1080, 1920), dtype=bool)
    mask[100:200, 300:400] = True
    here = masks.encode(mask)
    seen = [here, *[None] * 298, here]
    video = video_of(1, 300, *mask.shape)
    track = Track(id=1, video_id=1, category_id=3, iscrowd=False, segmentations=tuple(seen), areas=mask_areas(seen))
    labels = Labels(categories=(Category(id=3, name="c3"),), videos=(video,), tracks=(track,), has_tracks=True)
    found = (*seen[:-2], here, here)
    prediction = TrackPrediction(video_id=1, category_id=3, score=0.5, segmentations=found)
    assert VideoEvaluation(labels, [prediction])._coco.ious[1, 3].tolist() == [[2 / 3]]


def test_no_predictions_score_zero_and_no_labels_are_undefined() -> None:
    cells = np.ones((1, 1, 1), dtype=bool)
    labelled, nothing = as_files_have_it([2], [Object(video=2, category=3, cells=cells, scale=1)])
    assert evaluate_tracks(labelled, nothing).AP == 0.0
    empty, predictions = as_files_have_it([2], [Object(video=2, category=3, cells=cells, scale=1, score=0.5)])
    assert evaluate_tracks(empty, predictions).AP is None
    assert evaluate_tracks(empty.subset([]), []).AP is None


def test_a_split_without_labels_cannot_be_scored(tmp_path: Path) -> None:
    data = json.loads((GOLDEN / "gt.json").read_text())
    (tmp_path / "valid.json").write_text(json.dumps({**data, "annotations": None}))
    with pytest.raises(AnnotationError, match="no annotations to score against"):
        score.score(tmp_path / "valid.json", GOLDEN / "results.json")


def test_tracks_that_fit_no_video_are_refused() -> None:
    labels = load_labels(GOLDEN / "gt.json")
    good = load_results(GOLDEN / "results.json", labels)[0]
    other_size = masks.encode(np.ones((3, 3), dtype=bool))
    for changes, reason in [
        ({"video_id": 999}, "video 999"),
        ({"category_id": 77}, "category 77"),
        ({"segmentations": good.segmentations[1:]}, "10 masks of 120 x 96, got 9 masks"),
        ({"segmentations": (other_size,) * 10}, r"10 masks of \[\(3, 3\)\]"),
        ({"score": float("nan")}, "nan"),
    ]:
        fields = {name: getattr(good, name) for name in ("video_id", "category_id", "score", "segmentations")}
        with pytest.raises(AnnotationError, match=reason):
            evaluate_tracks(labels, [TrackPrediction(**{**fields, **changes})])


def test_score_command_writes_fractions_and_prints_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, dict[str, float]]
) -> None:
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    output = tmp_path / "deep" / "metrics.json"
    files = ["--annotations", str(GOLDEN / "gt.json"), "--predictions", str(GOLDEN / "results.json")]
    assert score.run(parser.parse_args([*files, "--output", str(output)])) == 0
    written = json.loads(output.read_text())
    assert written["AP"] == pytest.approx(expected["stats"]["AP"], abs=1e-9)
    assert written["APl"] is None
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[:2] == [["AP", "AP50", "AP75", "AR1", "AR10"], ["24.8", "47.1", "20.4", "28.6", "44.7"]]
    assert ["c4", "8.9"] in printed
    assert [path.name for path in output.parent.iterdir()] == ["metrics.json"]
