"""The whole pipeline on tiny videos with the demo's real detector, and what can go wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import ConfigError, FingerprintMismatch, VitaCacheError, WeightsError
from cache.reader import FeatureCache
from configs.schema import Settings, Split
from evaluate.report.write import write_report
from evaluate.score import score
from evaluate.stage import evaluate
from evaluate.tables import run_summary
from evaluate.tracks.predictors import head_predictor
from extract.__main__ import main as extract_main
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.train_until import before_step, interrupt
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.data.video_sets import open_evaluation_set
from train_head.run_folder import read_metrics_log
from train_head.trainer import train

ROOT = Path(__file__).parent.parent


def array_bytes(features: Path) -> dict[str, bytes]:
    """Every array file of a cache's videos."""
    files = sorted(path for path in features.rglob("videos/*/*/*") if path.is_file())
    return {str(path.relative_to(features)): path.read_bytes() for path in (*files, *features.rglob("videos/*/*/c*"))
            if path.is_file()}  # fmt: skip


def test_extract_train_evaluate_report(tiny_run: Settings) -> None:
    evaluation = evaluate(tiny_run)
    run = evaluation.folder
    written = json.loads((run / "metrics.json").read_text())
    assert written["split"] == "valid" and written["num_videos"] == 2
    for key in ("AP", "AP50", "AP75", "AR1", "AR10"):
        assert 0 <= written[key] <= 1
    labels = Path(tiny_run.data.root) / "valid.json"
    for folder in (run, run / "baseline"):  # anybody's scorer agrees with what the stage wrote
        again = score(labels, folder / "results.zip").to_json()
        stored = json.loads((folder / "metrics.json").read_text())
        assert {key: stored[key] for key in again} == again
    page = write_report(tiny_run).read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 6  # videos x frames
    assert page.count("data:image/png;base64,") >= 2 * 3 * 6  # and x (labels, head, baseline)
    assert page.count("<svg") == 4 and 'src="http' not in page and "<link" not in page and "<base" not in page
    summary = run_summary(tiny_run)
    assert all(word in summary for word in ("extract train", "extract valid", "train", "evaluate head", "AP50"))


def test_the_log_of_a_run(tiny_run: Settings) -> None:
    log = read_metrics_log(Path(tiny_run.runs) / tiny_run.name)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(entry["loss"]) for entry in log)
    rate = tiny_run.train.learning_rate
    rates = [entry["learning_rate"] for entry in log]
    assert rates == pytest.approx([rate / 2, rate, rate, rate, rate / 10, rate / 10])


def test_the_same_seed_gives_the_same_weights_and_metrics(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    metrics, weights = [], []
    for name in ("first", "second"):
        settings = tiny_settings(tiny_data, tiny_cache, tmp_path, f"name={name}", "seed=5")
        train(settings)
        result = evaluate(settings).metrics["head"]
        assert result is not None
        metrics.append(result.to_json())
        weights.append(load_checkpoint(tmp_path / name / CHECKPOINT).head)
    assert metrics[0] == metrics[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    other = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=other", "seed=6")
    train(other)
    changed = load_checkpoint(tmp_path / "other" / CHECKPOINT).head
    assert any(not torch.equal(weights[0][key], changed[key]) for key in changed)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    whole = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=whole")
    train(whole)
    broken = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=broken")
    with pytest.raises(KeyboardInterrupt), before_step(5, interrupt):  # two steps after the checkpoint of step 3
        train(broken)
    assert load_checkpoint(tmp_path / "broken" / CHECKPOINT).step == 3
    train(broken)
    expected = load_checkpoint(tmp_path / "whole" / CHECKPOINT)
    resumed = load_checkpoint(tmp_path / "broken" / CHECKPOINT)
    assert resumed.step == expected.step == 6
    assert all(torch.equal(expected.head[key], resumed.head[key]) for key in expected.head)
    losses = [[e["loss"] for e in read_metrics_log(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(tiny_run: Settings) -> None:
    run = Path(tiny_run.runs) / tiny_run.name
    before = (run / CHECKPOINT).read_bytes()
    train(tiny_run)
    assert (run / CHECKPOINT).read_bytes() == before
    tiny_run.train.learning_rate *= 2
    try:
        with pytest.raises(ConfigError, match=r"train.learning_rate was .*(\n|.)*another name"):
            train(tiny_run)
    finally:
        tiny_run.train.learning_rate /= 2


@pytest.mark.slow  # test_torture.py kills more often, of a process that need not import anything
def test_killed_extraction_goes_on_and_ends_in_the_same_bytes(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    features = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "extract",
        "run",
        "demo",
        f"data.root={tiny_data}",
        f"cache.path={features}",
        "cache.codec=float16",
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: the order of sums depends on the number of threads
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread, **quiet)
    deadline = time.monotonic() + 120
    while not (features / "train" / "videos" / "3").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = FeatureCache.open(features / "train").video_names()
    assert len(done) < 5
    kept = {name: (features / "train" / "videos" / name / "zarr.json").stat().st_mtime_ns for name in done}
    extract(tiny_settings(tiny_data, features, tmp_path))
    for name, stamp in kept.items():  # what was committed was not extracted again
        assert (features / "train" / "videos" / name / "zarr.json").stat().st_mtime_ns == stamp
    for split in ("train", "valid"):
        assert array_bytes(features / split) == array_bytes(tiny_cache / split)
        assert array_bytes(features / split)


def test_settings_of_another_head_are_told(tiny_run: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    head_predictor(tiny_run, open_evaluation_set(tiny_run))
    assert "warning" not in capsys.readouterr().out
    other = replace(tiny_run, head=replace(tiny_run.head, window=3, enc_layers=9))
    head_predictor(other, open_evaluation_set(tiny_run))
    assert "keeps its settings, whatever these say: head.enc_layers is 2, head.window is 6" in capsys.readouterr().out


def test_hold_out_without_validation_labels(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    hold_out = ["data.valid_labels=null", "data.valid_frames=null", "data.holdout=0.4", "name=hold_out"]
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, *hold_out)
    train(settings)
    evaluation = evaluate(settings)
    split = json.loads((tmp_path / "hold_out" / "split.json").read_text())
    assert evaluation.split == "holdout"
    assert sorted(split["train_ids"] + split["holdout_ids"]) == [1, 2, 3, 4, 5]
    predicted = json.loads((tmp_path / "hold_out" / "results.json").read_text())
    assert {entry["video_id"] for entry in predicted} == set(split["holdout_ids"])
    settings.data.holdout = 0.9
    with pytest.raises(ConfigError, match=r"of \d videos to evaluate on were trained on: (.|\n)*data\.holdout_seed"):
        evaluate(settings)
    nothing = tiny_settings(tiny_data, tiny_cache, tmp_path, *hold_out[:2], "name=nothing")
    with pytest.raises(ConfigError, match=r"data.holdout=0.1"):
        evaluate(nothing)


def test_predictions_for_a_split_without_labels(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    features, runs = tmp_path / "features", tmp_path / "runs"
    shutil.copytree(tiny_cache, features)
    shutil.copytree(Path(tiny_run.runs), runs)
    path = features / "valid" / "annotations.json"
    labels = json.loads(path.read_text())
    del labels["annotations"]
    path.write_text(json.dumps(labels))
    evaluation = evaluate(tiny_settings(tiny_data, features, runs, "name=tiny"))
    assert evaluation.metrics == {"head": None, "baseline": None}
    assert (runs / "tiny" / "results.zip").exists()
    both = ["name=tiny", "data.holdout=0.4"]
    assert open_evaluation_set(tiny_settings(tiny_data, tiny_cache, runs, *both)).split == "valid"
    assert (
        open_evaluation_set(tiny_settings(tiny_data, features, runs, *both)).split == "holdout"
    )  # the one with labels
    assert open_evaluation_set(tiny_settings(tiny_data, features, runs, *both, "evaluate.split=valid")).split == "valid"


def test_the_metrics_of_another_split_are_kept(
    tiny_run: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / "tiny")
    settings = replace(tiny_run, runs=str(tmp_path))
    folders = [tmp_path / "tiny", tmp_path / "tiny" / "baseline"]
    evaluate(settings)
    evaluate(settings)
    of_valid = [(folder / "metrics.json").read_bytes() for folder in folders]
    assert "follows split" not in capsys.readouterr().out
    evaluate(replace(settings, evaluate=replace(settings.evaluate, split=Split.train)))
    assert [(folder / "metrics.valid.json").read_bytes() for folder in folders] == of_valid
    assert all((folder / "results.valid.zip").exists() for folder in folders)
    assert all(json.loads((folder / "metrics.json").read_text())["split"] == "train" for folder in folders)
    told = capsys.readouterr().out
    assert f"split train follows split valid, whose metrics are now in {folders[0] / 'metrics.valid.json'}" in told
    evaluate(settings)  # and back: nothing is kept twice
    assert not (tmp_path / "tiny" / "metrics.valid.json").exists()
    assert json.loads((tmp_path / "tiny" / "metrics.train.json").read_text())["split"] == "train"


# What goes wrong: one clear error each, and nothing that was stored is lost.


@pytest.fixture
def broken_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data to damage."""
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


def run_extract(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["extract", "run", "demo", *map(str, words)])
    status = extract_main()
    return status, capsys.readouterr().err


def damage_labels(root: Path, damage: str) -> None:
    path = root / "train.json"
    labels = json.loads(path.read_text())
    first = labels["annotations"][0]
    if damage == "missing field":
        del labels["videos"][1]["file_names"]
    elif damage == "number of frames":
        first["segmentations"].append(None)
    elif damage == "unknown category":
        first["category_id"] = 77
    path.write_text("{" if damage == "not JSON" else json.dumps(labels))


@pytest.mark.parametrize(
    ("place", "words"), [("file/a", "file is where a folder"), ("shut/a", "shut cannot be written")]
)
def test_a_cache_that_can_have_no_folder_is_refused_before_the_detector_is_read(
    tiny_data: Path,
    tmp_path: Path,
    place: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("not a cache")
    (tmp_path / "shut").mkdir()
    access = os.access  # nothing is shut to root
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut" and access(path, mode))
    given = f"data.root={tiny_data}", "detector.weights=not/there.pkl"
    status, message = run_extract(monkeypatch, capsys, *given, f"cache.path={tmp_path / place}")
    assert status == 2 and words in message and str(tmp_path / place) in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing field", ["file_names", "train.json"]),
        ("number of frames", ["list of 6", "got 7", "annotation"]),
        ("unknown category", ["category", "77"]),
        ("not JSON", ["train.json", "JSON"]),
    ],
)
def test_broken_labels_stop_before_any_work(
    broken_data: Path,
    damage: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage_labels(broken_data, damage)
    features = broken_data.parent / "features"
    status, message = run_extract(monkeypatch, capsys, f"data.root={broken_data}", f"cache.path={features}")
    assert status == 2 and message.startswith("error: ")
    assert all(word in message for word in words), message
    assert "Traceback" not in message and not features.exists()


def test_wrong_paths(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        f"data.root={tmp_path}/nowhere": "nowhere",
        f"data.train_frames={tmp_path}/nowhere": "data.*_frames",
        f"detector.weights={tmp_path}/weights.pkl": "weights.pkl",
    }
    for override, words in cases.items():
        features = tmp_path / "features"
        data = () if override.startswith("data.root") else (f"data.root={tiny_data}",)
        status, message = run_extract(monkeypatch, capsys, *data, f"cache.path={features}", override)
        assert status == 2 and words in message and "Traceback" not in message
        assert not features.exists()


def test_a_truncated_jpeg_keeps_what_was_extracted_and_goes_on_when_mended(
    broken_data: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = sorted((broken_data / "train" / "JPEGImages").glob("*0003/*.jpg"))[2]
    intact = victim.read_bytes()
    victim.write_bytes(intact[: len(intact) // 2])
    features = broken_data.parent / "features"
    words = (f"data.root={broken_data}", f"cache.path={features}", "cache.codec=float16")
    status, message = run_extract(monkeypatch, capsys, *words)
    assert status == 2 and victim.name in message and "truncated" in message
    complete = FeatureCache.open(features / "train").video_names()
    assert {"1", "2"} <= set(complete) and "3" not in complete
    victim.write_bytes(intact)
    assert run_extract(monkeypatch, capsys, *words)[0] == 0
    assert array_bytes(features / "train") == array_bytes(tiny_cache / "train")


def test_a_cache_of_another_detector_is_refused_by_both_consumers(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    features = tmp_path / "features"
    shutil.copytree(tiny_cache, features)
    detector = tmp_path / "detector"
    shutil.copytree(ROOT / "extract" / "demo" / "detector", detector)
    from safetensors.torch import load_file, save_file

    weights = load_file(detector / "model.safetensors")
    weights["class_predictor.bias"] = weights["class_predictor.bias"] + 1
    save_file(weights, detector / "model.safetensors", metadata={"format": "pt"})
    other = tiny_settings(tiny_data, features, tmp_path, f"detector.weights={detector}")
    with pytest.raises(FingerprintMismatch, match="detector weights"):
        extract(other)
    assert array_bytes(features / "train") == array_bytes(tiny_cache / "train")
    elsewhere = tmp_path / "other_features"
    other.cache.path = str(elsewhere)
    extract(other)
    run = tmp_path / "tiny"
    shutil.copytree(Path(tiny_run.runs) / "tiny", run)
    mixed = tiny_settings(tiny_data, elsewhere, tmp_path, "name=tiny", "train.iterations=6")
    with pytest.raises(FingerprintMismatch, match=r"trained on other features(.|\n)*detector weights"):
        evaluate(mixed)
    with pytest.raises(FingerprintMismatch, match=r"detector.short_edge"):
        train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=edge", "detector.short_edge=90"))


def test_stage_two_without_stage_one_says_what_to_run(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(VitaCacheError, match="make extract"):
        train(tiny_settings(tiny_data, tmp_path / "no_cache", tmp_path))
    with pytest.raises(WeightsError, match="make train"):
        evaluate(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=untrained"))
    with pytest.raises(VitaCacheError, match="make evaluate"):
        write_report(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=untrained"))


def test_a_label_file_that_the_cache_does_not_carry_is_told(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_data / "valid.json", tmp_path)
    settings = tiny_settings(tmp_path, tiny_cache, tmp_path)
    open_evaluation_set(settings)
    assert capsys.readouterr().out == ""
    with (tmp_path / "valid.json").open("a") as file:
        file.write("\n")
    open_evaluation_set(settings)
    told = f"warning: {tmp_path}/valid.json differs from {tiny_cache}/valid/annotations.json, whose labels are used"
    assert told in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused(tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path) -> None:
    shutil.copytree(Path(tiny_run.runs) / "tiny", tmp_path / "tiny")
    checkpoint = tmp_path / "tiny" / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="not a checkpoint"):
        evaluate(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=tiny"))


def test_features_that_explode_stop_the_run_with_the_videos_named(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=nan", "train.learning_rate=1e30", "train.warmup=1")
    with pytest.raises(VitaCacheError, match=r"not finite(.|\n)*shapes_train_000"):
        train(settings)


def test_one_frame_videos_work(tmp_path: Path) -> None:
    from extract.demo.videos import write_split

    for split in ("train", "valid"):
        write_split(tmp_path / "data", split, 2, num_frames=1)
    settings = tiny_settings(tmp_path / "data", tmp_path / "features", tmp_path, "train.iterations=2")
    extract(settings)
    train(settings)
    evaluate(settings)
    assert Image.open(next((tmp_path / "data").rglob("*.jpg"))).size in ((160, 90), (120, 96))
    assert len(json.loads((tmp_path / "demo" / "results.json").read_text())) > 0
