"""The same cache in a folder, in one HDF5 file and in an object store must read alike and refuse alike."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
import pytest

from cache.__main__ import main
from cache.errors import CacheError, CorruptData, FingerprintMismatch, IncompleteVideo
from cache.reader import ClipArrays, FeatureCache
from cache.storage.connection import remote_url
from cache.storage.remote import RemoteStore
from cache.upkeep.staging import stage
from cache.upkeep.transfer import export_hdf5, import_hdf5
from cache.upkeep.upload import upload
from tests.cache_samples import (
    FINGERPRINT,
    attributes_of,
    files_below,
    flip_bit,
    labels_of,
    open_writer,
    random_features,
    read_in_worker,
    write_video,
)
from tests.object_store import local_s3

LENGTHS = {1: 70, 2: 5}
Place = Callable[[Path], str]
"""Puts the cache in a folder somewhere else and returns where."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with local_s3("features") as address:
        yield address


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "train"
    writer = open_writer(path, labels_of(LENGTHS))
    for name, length in LENGTHS.items():
        write_video(writer, str(name), length, seed=name)
    return path


@pytest.fixture(scope="module")
def original_in_bucket(original: Path, bucket: str) -> str:
    upload(original, f"{bucket}/original")
    return f"{bucket}/original"


@pytest.fixture(params=["folder", "hdf5", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    def in_folder(path: Path) -> str:
        return str(shutil.copytree(path, tmp_path / "copy"))

    def in_file(path: Path) -> str:
        export_hdf5(FeatureCache.open(path), tmp_path / "copy.h5")
        return str(tmp_path / "copy.h5")

    def in_bucket(path: Path) -> str:
        if path == request.getfixturevalue("original"):
            return str(request.getfixturevalue("original_in_bucket"))
        address = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
        upload(path, address)
        return address

    return {"folder": in_folder, "hdf5": in_file, "s3": in_bucket}[request.param]


# The same over every store


def test_reads_like_the_folder(original: Path, place: Place) -> None:
    here, there = FeatureCache.open(original), FeatureCache.open(place(original))
    assert there.fingerprint == here.fingerprint and there.root == here.root
    assert there.video_names() == ["1", "2"] and there.incomplete() == []
    assert there.labels_json() == labels_of(LENGTHS)
    assert there.heads.category_names == here.heads.category_names
    for name, array in here.heads.arrays.items():
        np.testing.assert_array_equal(there.heads.arrays[name], array)
    video = there.video("1")
    assert video.attributes == attributes_of(70) and video.source == here.video("1").source
    np.testing.assert_array_equal(video.frame_queries(), random_features(70, 1)[0].astype(np.float16))
    np.testing.assert_array_equal(video.mask_features([69, 0, 0]), here.video("1").mask_features([69, 0, 0]))
    assert there.store.size("1", "mask_features") >= 70 * 6 * 7 * 11 * 2


def test_reads_whole_clips_into_given_buffers(original: Path, place: Place) -> None:
    video = FeatureCache.open(place(original)).video("1")
    frames = [66, 3, 3, 64]
    out = ClipArrays(
        frame_queries=np.zeros((4, *video.queries.shape[1:]), video.queries.dtype),
        mask_features=np.zeros((4, *video.maps.shape[1:]), video.maps.dtype),
    )
    clip = video.read_clip(frames, out)
    assert clip.frame_queries is out.frame_queries and clip.mask_features is out.mask_features
    queries, maps = random_features(70, 1)
    np.testing.assert_array_equal(out.frame_queries, queries.astype(np.float16)[frames])
    np.testing.assert_array_equal(out.mask_features, maps.astype(np.float16)[frames, :, :7, :11])
    assert np.array_equal(video.read_clip(frames).mask_features, out.mask_features)
    with pytest.raises(IndexError, match="70"):
        video.read_clip([70])


def test_travels_to_other_processes_unopened(original: Path, place: Place) -> None:
    feature_cache = FeatureCache.open(place(original))
    before = feature_cache.video("2").frame_queries([4])
    again: FeatureCache = pickle.loads(pickle.dumps(feature_cache))
    np.testing.assert_array_equal(again.video("2").frame_queries([4]), before)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_caches_in_use_travel_to_worker_processes(original: Path, place: Place, method: str) -> None:
    feature_cache = FeatureCache.open(place(original))
    here = read_in_worker(feature_cache)
    is_remote = isinstance(feature_cache.store, RemoteStore)
    if is_remote and method == "forkserver":
        pytest.skip("where another test has started the fork server, that does not know this S3 server's address")
    with multiprocessing.get_context(method).Pool(1) as pool:
        reading = pool.apply_async(read_in_worker, (feature_cache,))
        if is_remote and method == "fork":  # Without the refusal it would hang.
            with pytest.raises(CacheError, match=r"forked[\s\S]*forkserver"):
                reading.get(20)
            return
        there = reading.get(60)
    np.testing.assert_array_equal(there[0], here[0])
    np.testing.assert_array_equal(there[1], here[1])


def test_only_committed_videos_are_there(original: Path, place: Place, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "broken")
    marker = tmp_path / "broken/videos/2/zarr.json"
    marker.write_text(marker.read_text().replace('"complete": true', '"complete": false'))
    feature_cache = FeatureCache.open(place(tmp_path / "broken"))
    assert feature_cache.video_names() == ["1"]
    with pytest.raises(IncompleteVideo, match="'2'"):
        feature_cache.video("2")


def test_verify_accepts_it(original: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", place(original)]) == 0
    assert "2 videos, 0 defects" in capsys.readouterr().out


# One HDF5 file


@pytest.mark.parametrize("labels", [None, labels_of({7: 70})], ids=["no labels", "labels"])
def test_export_and_import_give_the_same_bytes(tmp_path: Path, labels: bytes | None) -> None:
    write_video(open_writer(tmp_path / "a", labels), "7", 70)
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "x.h5")]) == 0
    assert main(["import", str(tmp_path / "x.h5"), str(tmp_path / "b")]) == 0
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", "x.h5"}


def test_a_folder_name_finds_the_file_beside_it(original: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(original), tmp_path / "train.h5")
    assert FeatureCache.open(tmp_path / "train").video_names() == ["1", "2"]
    shutil.copytree(original, tmp_path / "train")
    assert FeatureCache.open(tmp_path / "train").path == tmp_path / "train"


def test_any_hdf5_reader_opens_it(original: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(original), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        maps = file["videos/2/mask_features"]
        assert maps.chunks == (1, 6, 7, 11) and maps.fletcher32
        np.testing.assert_array_equal(maps[3], random_features(5, 2)[1].astype(np.float16)[3, :, :7, :11])
        assert json.loads(bytes(file["attributes.json"][...]))["format"] == "vita-cache"


def test_damage_in_the_file_is_found(original: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(original), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        offset = file["videos/2/mask_features"].id.get_chunk_info_by_coord((3, 0, 0, 0)).byte_offset
    flip_bit(tmp_path / "x.h5", offset + 20)
    video = FeatureCache.open(tmp_path / "x.h5").video("2")
    assert video.mask_features([2, 4]).shape[0] == 2
    with pytest.raises(CorruptData, match=r"video '2', frame 3.*[\s\S]*python -m cache export"):
        video.mask_features([2, 3])


def test_export_and_import_never_overwrite(original: Path, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"thesis")
    with pytest.raises(CacheError, match="exists already"):
        export_hdf5(FeatureCache.open(original), tmp_path / "x.h5")
    with pytest.raises(CorruptData, match="not a readable HDF5 file"):
        FeatureCache.open(tmp_path / "x.h5")
    (tmp_path / "x.h5").unlink()
    with pytest.raises(CacheError, match="no feature cache here"):
        FeatureCache.open(tmp_path / "x.h5")
    export_hdf5(FeatureCache.open(original), tmp_path / "x.h5")
    with pytest.raises(CacheError, match="not empty"):
        import_hdf5(tmp_path / "x.h5", original)


def test_an_export_that_fails_leaves_nothing(original: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(original, tmp_path / "damaged")
    (damaged / "videos/2/mask_features/c.0.0.0.0").unlink()
    with pytest.raises(CorruptData, match=r"c\.0\.0\.0\.0"):
        export_hdf5(FeatureCache.open(damaged), tmp_path / "x.h5")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


# Object stores


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a") / "train", "s3://bucket/a/train"),
        ("gs://bucket", "gs://bucket"),
        ("caches/demo", None),
        ("/s3:/x", None),
    ],
)
def test_addresses_are_told_from_paths(path: Path | str, url: str | None) -> None:
    assert remote_url(path) == url


def test_staging_copies_what_is_missing(original: Path, original_in_bucket: str, tmp_path: Path) -> None:
    address = original_in_bucket
    assert main(["stage", address, str(tmp_path / "ssd")]) == 0
    assert files_below(tmp_path / "ssd") == files_below(original)
    shutil.rmtree(tmp_path / "ssd/videos/2")
    kept = (tmp_path / "ssd/videos/1/zarr.json").stat().st_ino
    stage(address, tmp_path / "ssd")
    assert files_below(tmp_path / "ssd") == files_below(original)
    assert (tmp_path / "ssd/videos/1/zarr.json").stat().st_ino == kept


def test_videos_added_later_are_uploaded_alone(original: Path, bucket: str, tmp_path: Path) -> None:
    address, folder = f"{bucket}/{tmp_path.name}", shutil.copytree(original, tmp_path / "a")
    upload(folder, address)
    write_video(open_writer(folder, labels_of({**LENGTHS, 3: 4})), "3", 4)
    upload(folder, address)
    assert FeatureCache.open(address).video_names() == ["1", "2", "3"]
    assert FeatureCache.open(address).labels_json() == labels_of({**LENGTHS, 3: 4})


def test_other_features_are_neither_staged_nor_uploaded_over(
    original: Path, original_in_bucket: str, tmp_path: Path
) -> None:
    address, other = original_in_bucket, tmp_path / "other"
    open_writer(other, fingerprint=replace(FINGERPRINT, short_edge=32))
    with pytest.raises(FingerprintMismatch, match="short edge"):
        stage(address, other)
    with pytest.raises(FingerprintMismatch, match="short edge"):
        upload(other, address)
    with pytest.raises(CacheError, match="local"):
        stage(original, tmp_path / "ssd")


def test_damage_in_the_object_store_is_found(original: Path, bucket: str, tmp_path: Path) -> None:
    address, folder = f"{bucket}/{tmp_path.name}", shutil.copytree(original, tmp_path / "a")
    flip_bit(folder / "videos/2/mask_features/c.0.0.0.0", 3 * (6 * 7 * 11 * 2 + 4) + 8)
    upload(folder, address)
    video = FeatureCache.open(address).video("2")
    assert video.mask_features([2, 4]).shape[0] == 2
    with pytest.raises(CorruptData, match="frame 3: checksum"):
        video.mask_features([3])
    with pytest.raises(CacheError, match="no feature cache here"):
        FeatureCache.open(f"{bucket}/nothing")


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{", '{"attributes": 3}'])
def test_damaged_metadata_in_the_object_store_harm_their_video_alone(
    original: Path, bucket: str, tmp_path: Path, content: str
) -> None:
    address = f"{bucket}/{tmp_path.name}"
    upload(original, address)
    (tmp_path / "damaged").write_text(content)
    RemoteStore(url=address).put("videos/2/mask_features/zarr.json", tmp_path / "damaged")
    with pytest.raises(CorruptData, match=r"videos/2/mask_features.*layout"):
        FeatureCache.open(address).video("2").mask_features()
    RemoteStore(url=address).put("videos/2/zarr.json", tmp_path / "damaged")
    feature_cache = FeatureCache.open(address)
    assert (feature_cache.video_names(), feature_cache.incomplete()) == (["1"], ["2"])
    with pytest.raises(CorruptData, match=r"videos/2/zarr\.json"):
        feature_cache.video("2")


class _Denying(BaseHTTPRequestHandler):
    """An object store that lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def test_a_refused_request_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Denying) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        store = RemoteStore(url="s3://private/a")
        for request, what in ((store.names, "listed"), (store.listing, "listed"), (store.get, "read")):
            with pytest.raises(CacheError, match=rf"s3://private/a/videos.* cannot be {what}[\s\S]*credentials"):
                request("videos")
        server.shutdown()


def test_a_plain_web_server_is_refused_with_a_hint() -> None:
    with pytest.raises(CacheError, match=r"https://example\.org/a: a web server does not list[\s\S]*hint: .*s3://"):
        FeatureCache.open("https://example.org/a")
