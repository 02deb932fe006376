"""Writing into an object store: video by video, interrupted anywhere, continued without a stored byte sent again.

What has changed is replaced and what nobody needs is pruned; no reader may ever take part of a video for the whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from cache.__main__ import main
from cache.codecs.float16 import Float16
from cache.errors import CacheError, FingerprintMismatch, VideoBusy
from cache.fingerprint import Fingerprint
from cache.reader import FeatureCache
from cache.remote_writer import opened_writer
from cache.storage.remote import RemoteStore
from cache.upkeep.maintenance import prunable, prune
from cache.upkeep.staging import stage, staged_folder
from cache.upkeep.transfer import export_hdf5
from cache.upkeep.upload import put_video, upload
from cache.writer import CacheWriter
from tests.cache_samples import (
    FINGERPRINT,
    files_below,
    fitted_codec,
    labels_of,
    open_writer,
    random_heads,
    write_video,
)
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


def uploaded_files(address: str) -> dict[str, bytes | None]:
    store = RemoteStore(url=address)
    return {name: store.get(name) for name in store.listing()}


def objects(address: str) -> dict[str, bytes | None]:
    """But for the root, which says when and where."""
    return {name: content for name, content in uploaded_files(address).items() if name != "zarr.json"}


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
    with pytest.raises(FingerprintMismatch, match=r"s3://.*short edge"):
        write_pending(address, None, fingerprint=replace(FINGERPRINT, short_edge=32))
    with pytest.raises(FingerprintMismatch, match=r"s3://.*video '1'.*other frames"):
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


# What has changed


def write_folder(path: Path, lengths: dict[int, int], seed: int = 0, prefix: str = "", codec: str = "logit") -> Path:
    """Write what is missing, with a codec whose shards' sizes depend on the features or, float16, do not."""
    writer = open_writer(path, labels_of(lengths, prefix), codec=fitted_codec(codec))
    for name in writer.pending([str(video) for video in lengths]):
        write_video(writer, name, lengths[int(name)], seed=seed + int(name))
    return path


def changed_folder(path: Path) -> Path:
    """Video 1 is shorter by a shard than before."""
    shutil.rmtree(path / "videos/1")
    return write_folder(path, {**LENGTHS, 1: 5}, seed=7)


def require_consistent(address: str) -> None:
    """Every complete video shows the frames that the labels list, and can be read to the last byte."""
    assert main(["verify", address]) in (0, 1)
    for name in FeatureCache.open(address).video_names():
        video = FeatureCache.open(address).video(name)
        listed = {str(entry["id"]): entry for entry in json.loads(FeatureCache.open(address).labels_json())["videos"]}
        assert video.attributes.num_frames == listed[name]["length"] == len(video.frame_queries())
        assert len(video.mask_features()) == listed[name]["length"]


def stop_after(calls: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network breaks down before the n-th object is put or deleted."""
    original, done = getattr(RemoteStore, method), []

    def one(self: RemoteStore, names: str | Sequence[str], *rest: Path) -> None:
        for name in [names] if isinstance(names, str) else names:
            if len(done) >= calls:
                raise CacheError("connection lost", where=name)
            done.append(name)
            original(self, name if rest else [name], *rest)

    monkeypatch.setattr(RemoteStore, method, one)


@pytest.mark.parametrize("method, calls", [("put", 0), ("put", 34), ("delete", 1)])
def test_a_video_that_shows_other_frames_is_replaced(
    method: str, calls: int, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", {**LENGTHS, 1: 70})
    upload(folder, address)
    changed_folder(folder)
    with monkeypatch.context() as patch, pytest.raises(CacheError, match="connection lost"):
        stop_after(calls, method, patch)
        upload(folder, address)
    require_consistent(address)
    upload(folder, f"{address}/")
    assert uploaded_files(address) == files_below(folder), "shards of the longer video are left over, or others missing"


@pytest.mark.parametrize("codec", ["logit", "float16"])
def test_a_video_of_other_bytes_is_replaced_and_no_other_is_sent_again(
    codec: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS, codec=codec)
    upload(folder, address)
    shutil.rmtree(folder / "videos/1")
    write_folder(folder, LENGTHS, seed=98, codec=codec)
    sent: list[str] = []
    original = RemoteStore.put
    monkeypatch.setattr(RemoteStore, "put", lambda self, name, file: (sent.append(name), original(self, name, file)))
    upload(folder, address)
    assert {name.split("/")[1] for name in sent if name.startswith("videos/")} == {"1", "zarr.json"}
    assert uploaded_files(address) == files_below(folder)


def test_labels_follow_and_no_video_is_sent_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    upload(folder, address)
    labels = json.loads(labels_of(LENGTHS))
    labels["categories"] = [{"id": 1, "name": "circle"}]
    open_writer(folder, json.dumps(labels).encode(), codec=fitted_codec("logit"))
    monkeypatch.setattr("cache.upkeep.upload.put_video", None)
    upload(folder, address)
    assert FeatureCache.open(address).labels_json() == json.dumps(labels).encode()


def test_another_data_set_does_not_replace_one_by_mistake(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(write_folder(tmp_path / "a", LENGTHS, prefix="ytvis"), address)
    before, other = uploaded_files(address), write_folder(tmp_path / "b", LENGTHS, seed=9, prefix="ovis")
    assert main(["upload", str(other), address]) == 2
    said = capsys.readouterr().err
    assert "all videos that are there too are others than here: 1, 2, 3" in said and "--replace" in said
    assert uploaded_files(address) == before
    assert main(["upload", str(other), address, "--replace"]) == 0
    assert uploaded_files(address) == files_below(other)


def test_other_frames_of_videos_that_are_not_here_are_refused(address: str, tmp_path: Path) -> None:
    """The new labels would be read with the old features."""
    folder = write_folder(tmp_path / "a", LENGTHS)
    upload(folder, address)
    before = uploaded_files(address)
    shutil.rmtree(folder / "videos/1")
    open_writer(folder, labels_of({**LENGTHS, 1: 6}), codec=fitted_codec("logit"))
    with pytest.raises(FingerprintMismatch, match=r"video '1'"):
        upload(folder, address)
    assert uploaded_files(address) == before


def test_what_cannot_be_uploaded_is_refused_with_what_to_do(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    export_hdf5(FeatureCache.open(folder), tmp_path / "x.h5")
    assert main(["upload", str(tmp_path / "x.h5"), address]) == 2
    assert f"python -m cache import {tmp_path}/x.h5" in capsys.readouterr().err
    assert main(["upload", str(folder), str(tmp_path / "b")]) == 2
    assert "expected s3://..." in capsys.readouterr().err
    upload(folder, address)
    assert main(["upload", address, f"{address}-copy"]) == 2
    assert f"python -m cache stage {address} FOLDER" in capsys.readouterr().err


# Pruning


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour has passed since the last upload."""
    monkeypatch.setattr("cache.upkeep.maintenance.IDLE", timedelta())


def names_there(address: str) -> list[str]:
    return RemoteStore(url=address).names("videos")


def leave_unfinished(address: str, name: str) -> None:
    RemoteStore(url=address).delete([f"videos/{name}/zarr.json"])


def test_unfinished_and_orphaned_videos_are_pruned(
    address: str, tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    open_writer(folder, labels_of({1: 5, 2: 3}), codec=fitted_codec("logit"))
    upload(folder, address)
    leave_unfinished(address, "2")
    assert main(["prune", address]) == 0
    shown = capsys.readouterr().out
    assert f"{address}/videos/3: not in annotations.json" in shown and "nothing done yet" in shown
    assert f"{address}/videos/2: extraction did not finish" in shown and "videos/1" not in shown
    assert names_there(address) == ["1", "2", "3"]
    assert main(["prune", address, "--delete"]) == 0
    assert "2 videos" in capsys.readouterr().out
    kept = {name for name in files_below(folder) if not name.startswith(("videos/2/", "videos/3/"))}
    assert uploaded_files(address).keys() == kept
    require_consistent(address)


def test_what_may_still_be_uploaded_is_not_pruned(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(write_folder(tmp_path / "a", LENGTHS), address)
    leave_unfinished(address, "2")
    assert main(["prune", address, "--delete"]) == 1
    said = capsys.readouterr().out
    assert "put 0 minutes ago, so an upload may still be running" in said and "deleted, but for 1" in said
    assert names_there(address) == ["1", "2", "3"]


def test_a_video_that_was_finished_meanwhile_is_not_pruned(address: str, tmp_path: Path, idle: None) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    upload(folder, address)
    leave_unfinished(address, "2")
    found = prunable(FeatureCache.open(address))
    upload(folder, address)
    assert prune(found) == [] and uploaded_files(address) == files_below(folder)


def test_a_damaged_marker_alone_does_not_delete_a_video(address: str, tmp_path: Path, idle: None) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    upload(folder, address)
    (tmp_path / "damaged").write_bytes(b"{")
    RemoteStore(url=address).put("videos/2/zarr.json", tmp_path / "damaged")
    assert main(["prune", address, "--delete"]) == 0 and names_there(address) == ["1", "2", "3"]
    assert main(["prune", address, "--delete", "--unreadable"]) == 0 and names_there(address) == ["1", "3"]


def test_a_prune_that_is_stopped_leaves_no_complete_video_without_its_shards(
    address: str, tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    open_writer(folder, labels_of({1: 5, 2: 3}), codec=fitted_codec("logit"))
    upload(folder, address)
    with monkeypatch.context() as patch, pytest.raises(CacheError, match="connection lost"):
        stop_after(1, "delete", patch)
        prune(prunable(FeatureCache.open(address)))
    assert FeatureCache.open(address).video_names() == ["1", "2"]
    assert names_there(address) == ["1", "2", "3"]
    prune(prunable(FeatureCache.open(address)))
    assert names_there(address) == ["1", "2"]


def test_a_video_that_was_pruned_while_it_was_uploaded_is_not_committed(
    address: str, tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", LENGTHS)
    upload(folder, address)
    leave_unfinished(address, "2")
    original, target = RemoteStore.listing, RemoteStore(url=address)

    def listing(self: RemoteStore, prefix: str | None = None) -> dict[str, int]:
        monkeypatch.setattr(RemoteStore, "listing", original)
        assert prune(prunable(FeatureCache.open(address))) == []
        return original(self, prefix)

    monkeypatch.setattr(RemoteStore, "listing", listing)
    with pytest.raises(VideoBusy, match=r"videos/2: another process deletes[\s\S]*same command again"):
        put_video(target, folder, "2")
    assert FeatureCache.open(address).video_names() == ["1", "3"]
