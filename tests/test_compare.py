"""Runs against each other: who is a seed of whom, what is refused, and that the tables say what the scorer says."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cache.errors import CacheError, ConfigError
from configs.schema import Settings
from evaluate.compare import command
from evaluate.compare.checks import differences, require_pairs
from evaluate.compare.groups import read_groups
from evaluate.compare.report import table, write_comparison
from evaluate.compare.result import _spread, compare
from evaluate.compare.videos import changed_videos
from evaluate.metrics.video_ap import VideoEvaluation
from evaluate.pictures.overlays import predicted_tracks
from evaluate.report.write import write_report
from evaluate.score import score
from evaluate.stage import evaluate
from tests.naive_video_ap import Object, naive_metrics
from tests.track_samples import CATEGORIES, as_files_have_it


@pytest.fixture(scope="module")
def runs(tiny_run: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one kind (of the same weights, so of no spread), and `other`, which finds nothing in video 1."""
    folder = tmp_path_factory.mktemp("compared")
    evaluated = evaluate(tiny_run).folder
    for name, changes in {
        "kind-0": {},
        "kind-1": {"\nseed: 0": "\nseed: 1"},
        "other": {"sim_weight: 0.5": "sim_weight: 0.0"},
    }.items():
        shutil.copytree(evaluated, folder / name)
        edit(folder / name / "config.yaml", {"name: tiny": f"name: {name}", **changes})
    results = folder / "other" / "results.json"
    tracks = json.loads(results.read_text())
    first = min(track["video_id"] for track in tracks)
    results.write_text(json.dumps([track for track in tracks if track["video_id"] != first]))
    return folder


def edit(path: Path, changes: dict[str, str]) -> None:
    """Replace whole lines of a file, each of which must be there."""
    text = path.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


@pytest.fixture
def edited(runs: Path, tmp_path: Path) -> Path:
    """A copy of the runs, to spoil."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def test_seeds_make_a_group_named_by_what_differs(runs: Path) -> None:
    groups = read_groups([str(runs / name) for name in ("kind-0", "other", "kind-1")])
    assert [(group.name, [entry.run.name for entry in group.entries]) for group in groups] == [
        ("sim_weight=0.5", ["kind-0", "kind-1"]),
        ("sim_weight=0.0", ["other"]),
        ("baseline", ["kind-0"]),  # without training it is the same for all
    ]
    assert [group.name for group in read_groups([str(runs / "kind-0"), str(runs / "kind-1")], [])] == ["head"]
    named = read_groups([f"mine={runs}/kind-*", f"theirs={runs / 'other'}"], ["baseline"])
    assert [(group.name, len(group.entries)) for group in named] == [("mine", 2), ("theirs", 1), ("baseline", 1)]


def test_tables_say_what_the_scorer_says(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    groups = read_groups([f"mine={runs}/kind-*", str(runs / "other")])
    require_pairs(groups)
    assert differences(groups) == []
    comparison = compare(groups, resamples=40, min_score=0.005)
    scored = [score(tiny_data / "valid.json", path / "results.json") for path in (runs / "kind-0", runs / "other")]
    scored.append(score(tiny_data / "valid.json", runs / "kind-0" / "baseline" / "results.json"))
    for row, metrics in zip(comparison.rows, scored, strict=True):
        for name, measured in row.metrics.items():
            assert measured.interval.value == pytest.approx(metrics.to_json()[name], abs=1e-12)
        by_category = {part.name: part for part in comparison.parts if part.kind == "category"}
        index = comparison.rows.index(row)
        for name, part in by_category.items():
            assert part.groups[index].interval.value == pytest.approx(metrics.per_category[name], abs=1e-12)
    mine, other, baseline = comparison.rows
    assert mine.metrics["AP"].difference is None and mine.metrics["AP"].spread == 0
    assert other.metrics["AP"].spread is None
    lost = other.metrics["AP"].difference
    assert lost is not None and lost.interval.value == pytest.approx(scored[1].AP - scored[0].AP)
    assert mine.costs.trainable_parameters > 0 and baseline.costs.trainable_parameters == 0
    assert mine.costs.cache_bytes == other.costs.cache_bytes > 0
    paths = write_comparison(comparison, groups, tmp_path / "out")
    stored = json.loads(paths.json.read_text())
    assert stored["rows"][1]["metrics"]["AP"]["interval"]["value"] == pytest.approx(scored[1].AP)
    page = paths.html.read_text()
    assert page.count("data:image/jpeg;base64,") == len(comparison.changed) * 3 * 4  # sides x frames
    assert 'src="http' not in page and "default-src 'none'" in page and "<svg" in page
    drawn = predicted_tracks(groups[0].entries[0].labels, groups[0].entries[0].predictions[:1], 1, 0)
    score_of = groups[0].entries[0].predictions[0].score
    assert [track.caption.split()[-1] for track in drawn] == [f"{score_of:.2f}"]
    for text in (page, paths.markdown.read_text()):  # as in captions, tracks.json and --score
        assert "of score 0.005 or more" in text
    assert "| mine | 2 |" in paths.markdown.read_text() and "mine" in table(comparison)


def test_the_spread_is_the_sample_standard_deviation() -> None:
    assert _spread(np.array([0.1, 0.2, 0.6])) == pytest.approx(statistics.stdev([0.1, 0.2, 0.6]))
    assert _spread(np.array([0.1])) is None and _spread(np.array([np.nan, np.nan])) is None


def test_a_video_s_influence_is_the_difference_with_it_less_that_without_it() -> None:
    """The first group finds the objects of videos 2 and 3, the second one those of 1, 3 and 4."""
    cells = np.ones((1, 1, 1), dtype=bool)
    objects = [Object(video=v, category=3, cells=cells, scale=1) for v in (1, 2, 3, 4)]
    found = [[Object(video=v, category=3, cells=cells, scale=1, score=0.9) for v in of] for of in ([2, 3], [1, 3, 4])]
    evaluations = [VideoEvaluation(*as_files_have_it([1, 2, 3, 4], objects + of)) for of in found]
    entries = [SimpleNamespace(labels=each.labels, evaluation=each) for each in evaluations]
    groups = [SimpleNamespace(name=name, entries=[entry]) for name, entry in zip("ab", entries, strict=True)]

    def difference(videos: list[int]) -> float:
        first, second = (naive_metrics(videos, CATEGORIES, objects + of)["AP"] for of in found)
        assert first is not None and second is not None
        return second - first

    whole = [1, 2, 3, 4]
    changed = changed_videos(groups, 4)  # type: ignore[arg-type]
    for video in changed:
        without = [other for other in whole if other != video.video_id]
        assert video.influence == pytest.approx(difference(whole) - difference(without), abs=1e-9)
    assert [video.influence > 0 for video in sorted(changed, key=lambda v: v.video_id)] == [True, False, False, True]
    assert changed[0].video_id == 2 and (changed[0].ap_first, changed[0].ap_group) == pytest.approx((1, 0))


def test_names_are_escaped(runs: Path, tmp_path: Path) -> None:
    groups = read_groups([f"<script>alert(1)</script>={runs / 'kind-0'}", f"<b>|={runs / 'other'}"], [])
    page = write_comparison(compare(groups, ["<i>"], resamples=2), groups, tmp_path).html.read_text()
    assert "<script>" not in page and "<b>|" not in page and "<i>" not in page and "&lt;script&gt;" in page
    assert "&lt;b&gt;\\|" not in page and "<b>\\|" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iterations: 6": "iterations: 5"}, r"train\.iterations differs: 6 in kind-0; 5 in other"),
        ({"iterations: 6": "iterations: 9"}, "other stopped at step 6 of 9"),
    ],
)
def test_unequal_terms_are_named(edited: Path, changes: dict[str, str], reason: str) -> None:
    edit(edited / "other" / "config.yaml", changes)
    found = differences(read_groups([str(edited / "kind-0"), str(edited / "other")], []))
    assert found and any(re.search(reason, sentence) for sentence in found)


def test_unequal_evaluations_are_named(edited: Path, tiny_run: Settings) -> None:
    """What a run was evaluated with counts, not what it was trained with."""
    settings = replace(tiny_run, name="other", runs=str(edited))
    evaluate(replace(settings, evaluate=replace(tiny_run.evaluate, top_k=2, repeats=False, keep_queries=0.5)))
    assert "evaluate.top_k=2\n" in write_report(settings).read_text()
    groups = read_groups([str(edited / "kind-0"), str(edited / "other")], [])
    found = differences(groups)
    assert [sentence.partition(" ")[0] for sentence in found] == ["evaluate.top_k", "evaluate.repeats"]
    assert [group.entries[0].settings.evaluate.keep_queries for group in groups] == [1, 0.5]
    edit(edited / "other" / "metrics.json", {'"evaluate.checkpoint": "last"': '"evaluate.checkpoint": "best"'})
    found = differences(read_groups([str(edited / "kind-0"), str(edited / "other")], []))
    assert "evaluate.checkpoint differs: last in kind-0; best in other" in found


def test_changed_labels_are_named(edited: Path) -> None:
    metrics = edited / "other" / "metrics.json"
    stored = json.loads(metrics.read_text())
    metrics.write_text(json.dumps({**stored, "labels_sha256": "0" * 64}))
    found = differences(read_groups([str(edited / "kind-0"), str(edited / "other")], []))
    assert found == ["other (head) was evaluated before its labels changed"]


def test_predictions_of_an_earlier_step_are_named(edited: Path) -> None:
    edit(edited / "other" / "metrics.json", {'"step": 6': '"step": 4'})
    found = differences(read_groups([str(edited / "kind-0"), str(edited / "other")]))
    assert found == ["other (head) was evaluated at step 4 and trained to step 6 since: evaluate it again"]


def test_a_named_group_of_unlike_runs_is_named(runs: Path) -> None:
    groups = read_groups([f"mixed={runs / 'kind-0'},{runs / 'other'}"], [])
    assert differences(groups) == ["the runs of mixed differ in loss.sim_weight"]


def test_other_videos_cannot_be_paired(edited: Path) -> None:
    metrics = edited / "other" / "metrics.json"  # says which split was evaluated, whatever the config
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "split": "train"}))
    (edited / "other" / "results.json").write_text("[]")
    groups = read_groups([str(edited / "kind-0"), str(edited / "other")], [])
    with pytest.raises(ConfigError, match=r"other videos, so no pair can be made"):
        require_pairs(groups)


def test_what_is_no_run_or_has_no_such_method_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        read_groups([str(tmp_path / "absent")])
    with pytest.raises(ConfigError, match=r"kind-9: no run here"):  # mistyped among others
        read_groups([f"mine={runs / 'kind-0'},{runs / 'kind-9'}"])
    (tmp_path / "kind-file").touch()
    with pytest.raises(ConfigError, match=r"kind-\*: no folder matches"):
        read_groups([f"mine={tmp_path}/kind-*"])
    with pytest.raises(CacheError, match=r"no predictions of clips.*head, baseline"):
        read_groups([str(runs / "other")], ["clips"])
    with pytest.raises(ConfigError, match="a run is given twice"):
        read_groups([str(runs / "other"), f"{runs}/kind-0/../other"], [])


def test_make_compare_without_runs_says_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    command = ["make", "-C", str(Path(__file__).parent.parent), "compare", f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'no runs to compare. Hint: RUNS="runs/a runs/b"' in done.stderr


def test_the_command_refuses_unequal_terms_unless_told(
    edited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(edited / "other" / "metrics.json", {'top_k": 10': 'top_k": 20'})
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = [str(edited / "kind-0"), str(edited / "other"), "--output", str(tmp_path / "out"), "--resamples", "5"]
    with pytest.raises(ConfigError, match=r"evaluate\.top_k differs(.|\n)*--allow-differences"):
        command.run(parser.parse_args([*given, "--with"]))
    assert not (tmp_path / "out").exists()
    assert command.run(parser.parse_args([*given, "--allow-differences", "--with"])) == 0
    assert "WARNING, not on equal terms: evaluate.top_k differs" in capsys.readouterr().err
    for name in ("comparison.html", "comparison.md", "comparison.json"):
        assert "evaluate.top_k differs" in (tmp_path / "out" / name).read_text()
    with pytest.raises(ConfigError, match="--resamples"):
        command.run(parser.parse_args([*given, "--resamples", "0"]))
