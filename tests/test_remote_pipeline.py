"""The pipeline where features lie elsewhere than in a folder: extraction into a bucket, training and evaluation there,
from a staged copy and from one HDF5 file. All of it must equal what a folder gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.forkserver import _forkserver
from pathlib import Path

import pytest
import torch

from cache.reader import FeatureCache
from cache.upkeep.transfer import export_hdf5
from configs.schema import Settings
from evaluate.stage import evaluate
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.object_store import local_s3
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.trainer import train

Elsewhere = Callable[[], list[str]]
"""Puts the features somewhere and returns the settings that find them there."""


@pytest.fixture(scope="module")
def remote(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Both splits, extracted straight into a bucket; nothing may stay on the local disk."""
    temporary = tmp_path_factory.mktemp("temporary")
    with local_s3("pipeline") as bucket, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(temporary))
        extract(tiny_settings(tiny_data, f"{bucket}/features", temporary))
        assert list(temporary.iterdir()) == []
        yield f"{bucket}/features"


def features(path: Path | str) -> dict[str, bytes]:
    feature_cache = FeatureCache.open(path)
    videos = [feature_cache.video(name) for name in feature_cache.video_names()]
    return {video.name: video.frame_queries().tobytes() + video.mask_features().tobytes() for video in videos}


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_bucket_holds_what_a_folder_holds(remote: str, tiny_cache: Path, split: str) -> None:
    here, there = FeatureCache.open(tiny_cache / split), FeatureCache.open(f"{remote}/{split}")
    assert there.fingerprint == here.fingerprint and there.labels_json() == here.labels_json()
    assert len(there.root.sessions) == 1
    assert features(f"{remote}/{split}") == features(tiny_cache / split)


@pytest.fixture(params=["bucket", "bucket, by a worker", "staged", "hdf5"])
def elsewhere(request: pytest.FixtureRequest, tiny_cache: Path, tmp_path: Path) -> Elsewhere:
    def in_bucket() -> list[str]:
        return [f"cache.path={request.getfixturevalue('remote')}", "train.workers=0"]

    def by_a_worker() -> list[str]:
        address = request.getfixturevalue("remote")
        # Another test may have started the fork server, which then does not know the address of this test's S3 server.
        _forkserver._stop()  # type: ignore[attr-defined]
        request.addfinalizer(_forkserver._stop)  # type: ignore[attr-defined]
        return [f"cache.path={address}", "train.workers=1", "cache.preload=false"]

    def staged() -> list[str]:
        return [
            f"cache.path={request.getfixturevalue('remote')}",
            f"cache.stage_to={tmp_path / 'ssd'}",
            "train.workers=0",
        ]

    def in_files() -> list[str]:
        (tmp_path / "files").mkdir()
        for split in ("train", "valid"):
            export_hdf5(FeatureCache.open(tiny_cache / split), tmp_path / "files" / f"{split}.h5")
        return [f"cache.path={tmp_path / 'files'}", "train.workers=1", "cache.preload=false"]

    kinds = {"bucket": in_bucket, "bucket, by a worker": by_a_worker, "staged": staged, "hdf5": in_files}
    return kinds[request.param]


def test_training_and_evaluation_equal_those_from_a_folder(
    tiny_run: Settings, tiny_data: Path, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_data, tmp_path, tmp_path, "name=elsewhere", *elsewhere())
    train(settings)
    expected = load_checkpoint(Path(tiny_run.runs) / tiny_run.name / CHECKPOINT).head
    got = load_checkpoint(tmp_path / "elsewhere" / CHECKPOINT).head
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    metrics, reference = evaluate(settings).metrics, evaluate(tiny_run).metrics
    assert metrics["head"] == reference["head"] and metrics["baseline"] == reference["baseline"]
    if settings.cache.stage_to is not None:
        copy = tmp_path / "ssd" / "pipeline" / "features"
        assert features(copy / "train") == features(f"{settings.cache.path}/train")
        assert FeatureCache.open(copy / "valid").video_names() == ["1", "2"]
