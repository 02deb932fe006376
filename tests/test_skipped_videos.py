"""Videos that extraction cannot read: the others are trained and evaluated on, and what is missing is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import AnnotationError, ConfigError, CorruptData, FrameError, IncompleteVideo
from cache.fingerprint import Provenance
from cache.layout import EXTRACTION_RECORD, SKIPPED
from cache.reader import FeatureCache
from cache.upkeep.transfer import export_hdf5
from cache.upkeep.verification import verify_root
from cache.writer import CacheWriter
from configs.schema import Settings
from evaluate.compare.runs import LabelFiles
from evaluate.report.write import write_report
from evaluate.stage import evaluate
from evaluate.tables import evaluation_table, extraction_costs
from extract.record import add_to_record, write_skipped
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.object_store import local_s3
from train_head.data.video_sets import open_evaluation_set, open_training_set
from train_head.trainer import train

DAMAGED = {"train": 2, "valid": 1}
"""Split -> id of the video of which a frame is damaged."""


@pytest.fixture(scope="module")
def damaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of data of which both splits have a damaged video, extracted without these."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(tiny_data, root / "data")
    for split, video_id in DAMAGED.items():
        videos = json.loads((root / "data" / f"{split}.json").read_text())["videos"]
        name = next(video["file_names"][3] for video in videos if video["id"] == video_id)
        (root / "data" / split / "JPEGImages" / name).write_bytes(b"")
    settings = tiny_settings(root / "data", root / "features", root, "extract.skip_errors=true")
    with pytest.raises(FrameError, match=r"2 videos were skipped, such as train/2(.|\n)*do without them"):
        extract(settings)
    settings.name = "whole"
    return settings


def test_training_and_evaluation_do_without_skipped_videos(
    damaged: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(damaged)
    assert capsys.readouterr().out.count("extraction left out 1 of 5 videos (2)") == 1
    split = json.loads((run / "split.json").read_text())
    assert (split["skipped_ids"], split["train_ids"], split["holdout_ids"]) == ([2], [1, 3, 4, 5], [])
    table = evaluation_table(evaluate(damaged))
    assert "without 1 of 2 videos, which extraction could not read: not comparable" in table
    for folder in (run, run / "baseline"):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["num_videos"], metrics["skipped_ids"]) == (1, [1])
        assert {entry["video_id"] for entry in json.loads((folder / "results.json").read_text())} <= {2}
    assert "1 videos (1 more could not be read)" in write_report(damaged).read_text()
    assert [video.id for video in LabelFiles().of(damaged)[1].videos] == [2]  # as `evaluate compare` reads them


def test_a_run_does_not_go_on_with_videos_that_were_mended_since(
    damaged: Settings, tiny_cache: Path, tmp_path: Path
) -> None:
    features = tmp_path / "features"
    shutil.copytree(damaged.cache.path, features)
    words = ("train.iterations=2", "train.workers=0")
    settings = tiny_settings(Path(damaged.data.root), features, tmp_path, *words)
    split = train(settings) / "split.json"
    shutil.copytree(tiny_cache / "train" / "videos" / "2", features / "train" / "videos" / "2")
    with pytest.raises(ConfigError, match=rf"{split}: .*other videos: new 2\n"):
        train(settings)
    split.unlink()
    train(settings)
    assert json.loads(split.read_text())["train_ids"] == [1, 2, 3, 4, 5]


def test_skipped_videos_stay_on_their_side_of_the_hold_out(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    words = ("data.valid_labels=null", "data.valid_frames=null", "data.holdout=0.4")
    whole = open_evaluation_set(tiny_settings(tiny_data, tiny_cache, tmp_path, *words))
    features = tmp_path / "features"
    shutil.copytree(tiny_cache, features)
    lost, *kept = whole.video_ids
    shutil.rmtree(features / "train" / "videos" / str(lost))
    (features / "train" / SKIPPED).write_text(json.dumps({str(lost): "broken"}))
    settings = tiny_settings(tiny_data, features, tmp_path, *words)
    if kept:
        assert open_evaluation_set(settings).video_ids == tuple(kept)
    else:
        with pytest.raises(IncompleteVideo, match="left out 1 of 1 videos"):
            open_evaluation_set(settings)
    training = open_training_set(settings)
    assert (training.video_ids, training.skipped_ids) == (whole.holdout.train_ids, ())
    assert (training.holdout.skipped_ids, training.holdout.holdout_ids) == ((lost,), tuple(kept))


def test_the_record_follows_a_cache_and_forgets_what_was_mended(damaged: Settings, tmp_path: Path) -> None:
    features = Path(damaged.cache.path) / "train"
    export_hdf5(FeatureCache.open(features), tmp_path / "train.h5")
    assert list(FeatureCache.open(tmp_path / "train.h5").skipped()) == ["2"]
    copy = tmp_path / "copy"
    shutil.copytree(features, copy)
    shutil.copytree(copy / "videos" / "1", copy / "videos" / "2")
    assert FeatureCache.open(copy).skipped() == {}  # extracted since, by a session that was killed before it said so
    (copy / SKIPPED).write_text("[]")
    with pytest.raises(CorruptData, match="record of skipped videos"):
        FeatureCache.open(copy).skipped()


def test_the_record_in_a_bucket(damaged: Settings, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with local_s3("skipped") as bucket:
        path = f"{bucket}/features"
        settings = replace(damaged, cache=replace(damaged.cache, path=path))
        with pytest.raises(FrameError):
            extract(settings, only=["valid"])
        assert f"{path}/valid/skipped.json says why" in capsys.readouterr().err  # not the temporary folder's
        assert list(FeatureCache.open(f"{path}/valid").skipped()) == ["1"]
        extract(replace(settings, data=replace(settings.data, root=str(tiny_data))), only=["valid"])
        assert f"with which {path}/valid was begun" in capsys.readouterr().out
        assert FeatureCache.open(f"{path}/valid").skipped() == {}


def test_another_session_keeps_what_it_did_not_extract(damaged: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    record = Path(damaged.cache.path) / "train" / SKIPPED
    before = record.read_text()
    with pytest.raises(FrameError):
        extract(damaged)
    said = capsys.readouterr().err
    assert "1 of them cannot be read" in said and "goes on from here" not in said
    assert record.read_text() == before
    held = FeatureCache.open(record.parent)
    session = CacheWriter(held.path, held.fingerprint, held.codec, {}, Provenance.gather())
    write_skipped(session, {})  # as one that has left this video to another process
    assert record.read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"frames": "6", "more": 1}'])
def test_a_damaged_record_of_costs_begins_anew(damaged: Settings, tmp_path: Path, content: str) -> None:
    held = FeatureCache.open(Path(damaged.cache.path) / "valid")
    path = tmp_path / "valid"
    shutil.copytree(held.path, path)
    (path / EXTRACTION_RECORD).write_text(content)
    settings = replace(damaged, cache=replace(damaged.cache, path=str(tmp_path)))
    assert extraction_costs(settings) == []
    add_to_record(CacheWriter(path, held.fingerprint, held.codec, {}, Provenance.gather()), 2.0, 6)
    (cost,) = extraction_costs(settings)
    assert (cost.stage, cost.seconds) == ("extract valid", 2.0) and cost.bytes > 6 * 1000


def test_a_damaged_record_of_skipped_videos_is_an_error_in_words(damaged: Settings, tmp_path: Path) -> None:
    held = FeatureCache.open(Path(damaged.cache.path) / "valid")
    path = tmp_path / "valid"
    shutil.copytree(held.path, path)
    (path / SKIPPED).write_text("{")
    with pytest.raises(AnnotationError, match=r"valid/skipped\.json:1:2: malformed JSON"):
        write_skipped(CacheWriter(path, held.fingerprint, held.codec, {}, Provenance.gather()), {})
    assert [finding.rule for finding in verify_root(FeatureCache.open(path)) if not finding.warning] == ["skipped"]
