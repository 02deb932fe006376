"""Writing into an object store: video by video, interrupted anywhere, continued without a stored byte sent again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from cache.__main__ import main
from cache.codecs.float16 import Float16
from cache.errors import CacheError, FingerprintMismatch
from cache.fingerprint import Fingerprint
from cache.reader import FeatureCache
from cache.remote_writer import opened_writer
from cache.storage.remote import RemoteStore
from cache.upkeep.staging import stage, staged_folder
from cache.writer import CacheWriter
from tests.cache_samples import FINGERPRINT, files_below, labels_of, open_writer, random_heads, write_video
from tests.object_store import local_s3

LENGTHS = {1: 5, 2: 3, 3: 4}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with local_s3("uploads") as address:
        yield address


@pytest.fixture
def address(bucket: str, tmp_path: Path) -> str:
    return f"{bucket}/{tmp_path.name}"


@pytest.fixture(params=["staged", "through"])
def stage_to(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Whether local copies are kept."""
    return str(tmp_path / "ssd") if request.param == "staged" else None


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders appear."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def opened(
    address: str, stage_to: str | None, lengths: dict[int, int] = LENGTHS, fingerprint: Fingerprint = FINGERPRINT
) -> AbstractContextManager[CacheWriter]:
    codec, heads, labels = Float16(), random_heads(), labels_of(lengths)
    return opened_writer(Path(address), stage_to, fingerprint=fingerprint, heads=heads, codec=codec, labels_json=labels)


def write_pending(
    address: str, stage_to: str | None, lengths: dict[int, int] = LENGTHS, fingerprint: Fingerprint = FINGERPRINT
) -> list[str]:
    """What an extraction does; returns what was still to do."""
    with opened(address, stage_to, lengths, fingerprint) as writer:
        pending = writer.pending([str(video) for video in lengths])
        for name in pending:
            write_video(writer, name, lengths[int(name)], seed=int(name))
    return pending


def objects(address: str) -> dict[str, bytes | None]:
    store = RemoteStore(url=address)
    return {name: store.get(name) for name in store.listing() if name != "zarr.json"}


def folder_files(tmp_path: Path) -> dict[str, bytes]:
    """The same, written to a folder."""
    writer = open_writer(tmp_path / "reference", labels_of(LENGTHS))
    for name, length in LENGTHS.items():
        write_video(writer, str(name), length, seed=name)
    return {name: content for name, content in files_below(writer.path).items() if name != "zarr.json"}


def fail_after(puts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network breaks down in the middle of an upload."""
    original, done = RemoteStore.put, []

    def put(self: RemoteStore, name: str, file: Path) -> None:
        done.append(name)
        if len(done) > puts:
            raise CacheError("cannot be written: connection lost", where=name)
        original(self, name, file)

    monkeypatch.setattr(RemoteStore, "put", put)


def test_the_objects_are_the_files_of_a_folder(
    address: str, stage_to: str | None, temporary: Path, tmp_path: Path
) -> None:
    assert write_pending(address, stage_to) == ["1", "2", "3"]
    assert objects(address) == folder_files(tmp_path)
    assert len(FeatureCache.open(address).root.sessions) == 1
    assert list(temporary.iterdir()) == []
    if stage_to is not None:
        assert FeatureCache.open(staged_folder(Path(address), stage_to)).video_names() == ["1", "2", "3"]
    assert main(["verify", address]) == 0


@pytest.mark.parametrize("puts", [3, 33, 48])
def test_an_interrupted_upload_goes_on_where_it_stopped(
    puts: int, address: str, stage_to: str | None, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(CacheError, match="connection lost"):
        fail_after(puts, patch)
        write_pending(address, stage_to)
    store = RemoteStore(url=address)
    there = {name for name, complete in store.videos() if complete}
    assert store.attributes("") is not None or not there, "videos without a root"
    again = write_pending(address, stage_to)
    assert not there & set(again)
    assert objects(address) == folder_files(tmp_path)
    assert list(temporary.iterdir()) == []


def test_each_video_is_visible_before_the_next_is_written(address: str, temporary: Path) -> None:
    with opened(address, None) as writer:
        for name, length in LENGTHS.items():
            write_video(writer, str(name), length)
        local = {entry.name for entry in (writer.path / "videos").iterdir() if entry.is_dir()}
        assert FeatureCache.open(address).video_names()[:2] == ["1", "2"]
        assert "1" not in local and "2" not in local


def test_added_videos_are_uploaded_alone_and_labels_replaced(
    address: str, stage_to: str | None, temporary: Path
) -> None:
    write_pending(address, stage_to)
    assert write_pending(address, stage_to, {**LENGTHS, 4: 2}) == ["4"]
    feature_cache = FeatureCache.open(address)
    assert feature_cache.video_names() == ["1", "2", "3", "4"]
    assert feature_cache.labels_json() == labels_of({**LENGTHS, 4: 2})
    assert len(feature_cache.root.sessions) == 2


def test_other_features_and_other_frames_are_refused(address: str, stage_to: str | None, temporary: Path) -> None:
    write_pending(address, stage_to)
    before = objects(address)
    with pytest.raises(FingerprintMismatch, match=r"s3:/.*short edge"):
        write_pending(address, None, fingerprint=replace(FINGERPRINT, short_edge=32))
    with pytest.raises(FingerprintMismatch, match=r"s3:/.*video '1'.*other frames"):
        write_pending(address, None, {**LENGTHS, 1: 6})
    assert objects(address) == before


def test_two_caches_are_staged_to_two_folders(bucket: str, tmp_path: Path) -> None:
    """Of one detector, their fingerprints agree, and so do their videos' names."""
    places = [staged_folder(Path(f"{bucket}/{name}") / "train", str(tmp_path)) for name in ("ytvis", "ovis")]
    assert places == [tmp_path / "uploads/ytvis/train", tmp_path / "uploads/ovis/train"]


def test_the_command_uploads_and_stages(address: str, tmp_path: Path) -> None:
    write_video(open_writer(tmp_path / "a", labels_of({1: 5})), "1", 5)
    assert main(["upload", str(tmp_path / "a"), address]) == 0
    stage(address, tmp_path / "b")
    expected = (tmp_path / "a/videos/1/zarr.json").read_bytes()
    assert (tmp_path / "b/videos/1/zarr.json").read_bytes() == expected
