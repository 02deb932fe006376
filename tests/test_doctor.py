"""The doctor: green where all is well, red with a remedy for each thing that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.storage.remote import RemoteStore
from configs.schema import Settings
from extract.doctor import examine
from tests.conftest import tiny_settings
from tests.object_store import local_s3


def reds(settings: Settings) -> dict[str, str]:
    return {finding.name: finding.message for finding in examine(settings) if finding.remedy}


def test_all_is_well_with_the_tiny_data(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    findings = list(examine(tiny_settings(tiny_data, tiny_cache, tmp_path)))
    assert {finding.name for finding in findings} >= {"python", "pytorch", "gpu", "libraries", "weights", "cache train"}
    assert [finding for finding in findings if finding.remedy] == []


def test_every_fault_is_found_in_one_run(tiny_data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_data, tmp_path / "data")
    labels = json.loads((root / "train.json").read_text())
    (root / "train" / "JPEGImages" / labels["videos"][0]["file_names"][1]).unlink()
    (root / "valid.json").write_text("{not json")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "weights.pkl").write_bytes(b"nothing")
    settings = tiny_settings(
        root, tmp_path / "a_file" / "cache", tmp_path / "runs", f"detector.weights={tmp_path / 'weights.pkl'}"
    )
    found = reds(settings)
    assert set(found) == {"cache.path", "data train", "data valid", "weights"}
    assert labels["videos"][0]["file_names"][1] in found["data train"]


def test_a_bucket_is_tried_and_one_that_is_not_there_named(tiny_data: Path, tmp_path: Path) -> None:
    with local_s3("doctor") as bucket:
        assert "cache.path" not in reds(tiny_settings(tiny_data, f"{bucket}/a", tmp_path))
        assert list(RemoteStore(url=bucket).listing()) == []
        said = reds(tiny_settings(tiny_data, "s3://nowhere/a", tmp_path))["cache.path"]
    assert said == "s3://nowhere/a: cannot be used: The specified bucket does not exist (NoSuchBucket)"


def test_an_interrupted_extraction_is_named(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    feature_cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    metadata = next(iter((feature_cache / "train" / "videos").iterdir())) / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"complete": true', '"complete": false'))
    found = reds(tiny_settings(tiny_data, feature_cache, tmp_path))
    assert found == {"cache train": "1 of 5 videos are incomplete"}


def test_docker_s_shared_memory_is_too_small_for_workers(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    assert "shared" not in reds(tiny_settings(tiny_data, tiny_cache, tmp_path))  # the demo has no workers
    assert "shared" in reds(tiny_settings(tiny_data, tiny_cache, tmp_path, "train.workers=null"))
