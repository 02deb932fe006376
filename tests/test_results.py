"""The submission format: written whole, read back equal, refused with the entry and the video named."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from cache.errors import AnnotationError
from cache.labels.annotations import load_labels
from evaluate.results import load_results, write_results

GOLDEN = Path(__file__).parent / "golden" / "ytvis_eval"


def test_results_round_trip_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    labels = load_labels(GOLDEN / "gt.json")
    predictions = load_results(GOLDEN / "results.json", labels)
    zip_path = write_results(tmp_path / "a" / "results.json", predictions)
    assert zip_path == tmp_path / "a" / "results.zip"
    assert load_results(tmp_path / "a" / "results.json", labels) == predictions
    assert load_results(zip_path, labels) == predictions
    again = write_results(tmp_path / "b" / "results.json", iter(predictions))
    assert again.read_bytes() == zip_path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["results.json", "results.zip"]
    with zipfile.ZipFile(zip_path) as archive:
        assert archive.namelist() == ["results.json"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video_id": 999}, r"results\.json\[0\]: video 999 is unknown"),
        ({"category_id": 9}, r"\[0\] of video 1 \(v0000\): category 9 is unknown"),
        ({"segmentations": [None] * 9}, r"video 1 \(v0000\): .*10 items, one per frame, got 9 items"),
        ({"segmentations": [{"size": [96, 120], "counts": "1"}] + [None] * 9}, r"video 1 .*\[120, 96\]"),
        ({"segmentations": [{"size": [120, 96], "counts": "1"}] + [None] * 9}, r"video 1 .*add up to 1"),
        ({"score": float("nan")}, r"video 1 .*'score' is wrong \(expected a finite number, got nan\)"),
        ({"score": float("inf")}, "got inf"),
        ({"score": 10**400}, "got 1000"),
        ({"score": "0.5"}, "'score' is wrong"),
        ({"score": None}, "got null"),
    ],
)
def test_broken_results_name_the_entry_and_the_video(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    entries = json.loads((GOLDEN / "results.json").read_text())
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**entries[0], **changes}, *entries[1:]]))
    with pytest.raises(AnnotationError, match=reason):
        load_results(path, load_labels(GOLDEN / "gt.json"))


def test_broken_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = load_labels(GOLDEN / "gt.json")
    path = tmp_path / "r.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.json", "[]")
    with pytest.raises(AnnotationError, match=r"no results\.json in the archive \(got other\.json\)"):
        load_results(path, labels)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("results.json", "[" + " " * 5000 + "]")
    monkeypatch.setattr("evaluate.results._MAX_UNZIPPED_BYTES", 5001)
    with pytest.raises(AnnotationError, match=r"too large when unpacked .*got 5002 bytes"):
        load_results(path, labels)
    monkeypatch.setattr("evaluate.results._MAX_UNZIPPED_BYTES", 5002)
    assert load_results(path, labels) == []
    damaged = bytearray(path.read_bytes())
    damaged[45] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(AnnotationError, match="the archive cannot be read"):
        load_results(path, labels)
    path.write_text("{}")
    with pytest.raises(AnnotationError, match="expected a list of tracks"):
        load_results(path, labels)
