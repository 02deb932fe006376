"""The whole life of a cache at `gs://` and `az://`, by their own clients (`s3://`: test_upload.py and others)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from cache.__main__ import main
from cache.codecs.float16 import Float16
from cache.errors import CorruptData
from cache.reader import FeatureCache
from cache.remote_writer import opened_writer
from cache.storage.remote import RemoteStore
from tests.cache_samples import (
    FINGERPRINT,
    files_below,
    fitted_codec,
    flip_bit,
    labels_of,
    open_writer,
    random_features,
    random_heads,
    write_video,
)
from tests.object_store import local_azure, local_google

LENGTHS = {1: 70, 2: 5, 3: 6}


@pytest.fixture(scope="module", params=["gs", "az"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    with (local_google if request.param == "gs" else local_azure)("features") as address:
        yield address


@pytest.fixture
def address(bucket: str, tmp_path: Path) -> str:
    return f"{bucket}/a folder/{tmp_path.name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with a compressed codec: its shards' lengths show only when they are read."""
    writer = open_writer(tmp_path / "a", labels_of(LENGTHS), codec=fitted_codec("logit"))
    for name, length in LENGTHS.items():
        write_video(writer, str(name), length, seed=name)
    return tmp_path / "a"


def objects(address: str) -> dict[str, bytes | None]:
    store = RemoteStore(url=address)
    return {name: store.get(name) for name in store.listing()}


def test_a_cache_is_uploaded_read_staged_and_pruned(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["upload", str(folder), address]) == 0
    assert objects(address) == files_below(folder)
    assert main(["inspect", address]) == 0 and "3 videos, 81 frames, 0 incomplete" in capsys.readouterr().out
    assert main(["verify", address]) == 0 and main(["diff", str(folder), address]) == 0
    here, there = FeatureCache.open(folder).video("1"), FeatureCache.open(address).video("1")
    np.testing.assert_array_equal(there.mask_features([69, 3, 3, 64]), here.mask_features([69, 3, 3, 64]))
    np.testing.assert_array_equal(there.frame_queries([64, 0]), here.frame_queries([64, 0]))
    assert main(["stage", address, str(tmp_path / "staged")]) == 0
    assert files_below(tmp_path / "staged") == files_below(folder)
    RemoteStore(url=address).delete(["videos/3/zarr.json", "videos/3/no such object"])
    monkeypatch.setattr("cache.upkeep.maintenance.IDLE", timedelta())
    assert main(["prune", address, "--delete"]) == 0
    kept = {name for name in files_below(folder) if not name.startswith("videos/3/")}
    assert objects(address).keys() == kept
    assert main(["upload", str(folder), address]) == 0
    assert objects(address) == files_below(folder)


def test_an_extraction_writes_there_and_goes_on(address: str) -> None:
    for expected in (["1", "2", "3"], []):
        with opened_writer(
            Path(address),
            None,
            fingerprint=FINGERPRINT,
            heads=random_heads(),
            codec=Float16(),
            labels_json=labels_of(LENGTHS),
        ) as writer:
            pending = writer.pending([str(name) for name in LENGTHS])
            assert pending == expected
            for name in pending:
                write_video(writer, name, LENGTHS[int(name)], seed=int(name))
    feature_cache = FeatureCache.open(address)
    expected_queries = random_features(70, seed=1)[0].astype(np.float16)
    np.testing.assert_array_equal(feature_cache.video("1").frame_queries(), expected_queries)
    assert feature_cache.heads.category_names == random_heads().category_names


def test_a_video_that_has_changed_is_replaced(address: str, folder: Path) -> None:
    assert main(["upload", str(folder), address]) == 0
    shutil.rmtree(folder / "videos/1")
    lengths = {**LENGTHS, 1: 5}
    write_video(open_writer(folder, labels_of(lengths), codec=fitted_codec("logit")), "1", 5, seed=9)
    assert main(["upload", str(folder), address]) == 0
    assert objects(address) == files_below(folder)


def test_a_bucket_that_is_not_there_is_told_as_such(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", bucket.replace("features", "nowhere")]) == 2
    assert "does not exist" in (said := capsys.readouterr().err) and "check the bucket's name" in said


def test_damage_there_is_found(address: str, folder: Path) -> None:
    flip_bit(folder / "videos/1/mask_features/c.0.0.0.0", -10)
    flip_bit(folder / "videos/2/frame_queries/c.0.0.0.0", 10)
    (folder / "detector/class_embed.bias/c.0").write_bytes(b"short")
    assert main(["upload", str(folder), address]) == 0
    feature_cache = FeatureCache.open(address)
    with pytest.raises(CorruptData, match=r"://.*videos/1/mask_features, frame 3[\s\S]*try again"):
        feature_cache.video("1").mask_features([3])
    with pytest.raises(CorruptData, match="frame 0"):
        feature_cache.video("2").frame_queries()
    with pytest.raises(CorruptData, match=r"class_embed\.bias"):
        print(feature_cache.heads)
    assert main(["verify", address]) == 1
