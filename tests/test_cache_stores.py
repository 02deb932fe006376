"""The same cache in a folder, in one HDF5 file and in an object store must read alike and refuse alike."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from cache.__main__ import main
from cache.codecs.rate_distortion import CALIBRATION, Calibration, write_calibration
from cache.errors import CacheError, CorruptData, FingerprintMismatch, IncompleteVideo, VitaCacheError
from cache.reader import ClipArrays, FeatureCache
from cache.storage.connection import in_words, remote_url
from cache.storage.remote import RemoteStore
from cache.upkeep.staging import local_copy, stage
from cache.upkeep.transfer import export_hdf5, import_hdf5
from cache.upkeep.upload import upload
from cache.upkeep.verification import verify_root
from tests.cache_samples import (
    FINGERPRINT,
    attributes_of,
    files_below,
    fitted_codec,
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


def write_cache(path: Path, codec: str = "float16") -> Path:
    writer = open_writer(path, labels_of(LENGTHS), codec=fitted_codec(codec))
    for name, length in LENGTHS.items():
        write_video(writer, str(name), length, seed=name)
    none = Calibration(rows=(), chosen=0, min_mask_iou=0.99, fitted_frames=8, held_out_frames=0)
    write_calibration(path, none)
    return path


@pytest.fixture(scope="module", params=["float16", "int8", "logit", "spectral"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp(request.param) / "train", request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what does not depend on the codec."""
    return write_cache(tmp_path_factory.mktemp("plain") / "train")


def stored_maps(feature_cache: FeatureCache, num_frames: int, seed: int) -> NDArray[Any]:
    """What the cache must hold of cache_samples' random maps."""
    return feature_cache.codec.encode(random_features(num_frames, seed)[1][..., :7, :11])


@pytest.fixture(params=["folder", "hdf5", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    def in_folder(path: Path) -> str:
        return str(shutil.copytree(path, tmp_path / "copy"))

    def in_file(path: Path) -> str:
        export_hdf5(FeatureCache.open(path), tmp_path / "copy.h5")
        return str(tmp_path / "copy.h5")

    def in_bucket(path: Path) -> str:
        address = f"{request.getfixturevalue('bucket')}/{path.parent.name}"
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
    np.testing.assert_array_equal(video.mask_features([69, 0, 0]), stored_maps(here, 70, 1)[[69, 0, 0]])
    assert there.store.size("1", "frame_queries") >= 70 * 3 * 4 * 6 * 2
    assert there.store.read_file(CALIBRATION) == here.store.read_file(CALIBRATION) is not None


def test_reads_whole_clips_into_given_buffers(original: Path, place: Place) -> None:
    feature_cache = FeatureCache.open(place(original))
    video = feature_cache.video("1")
    frames = [66, 3, 3, 64]
    out = ClipArrays(
        frame_queries=np.zeros((4, *video.queries.shape[1:]), video.queries.dtype),
        mask_features=np.zeros((4, *video.maps.shape[1:]), video.maps.dtype),
    )
    clip = video.read_clip(frames, out)
    assert clip.frame_queries is out.frame_queries and clip.mask_features is out.mask_features
    np.testing.assert_array_equal(out.frame_queries, random_features(70, 1)[0].astype(np.float16)[frames])
    np.testing.assert_array_equal(out.mask_features, stored_maps(feature_cache, 70, 1)[frames])
    assert np.array_equal(video.read_clip(frames).mask_features, out.mask_features)
    with pytest.raises(IndexError, match="70"):
        video.read_clip([70])


def test_travels_to_other_processes_unopened(plain: Path, place: Place) -> None:
    feature_cache = FeatureCache.open(place(plain))
    before = feature_cache.video("2").frame_queries([4])
    again: FeatureCache = pickle.loads(pickle.dumps(feature_cache))
    np.testing.assert_array_equal(again.video("2").frame_queries([4]), before)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_caches_in_use_travel_to_worker_processes(plain: Path, place: Place, method: str) -> None:
    feature_cache = FeatureCache.open(place(plain))
    here = read_in_worker(feature_cache)
    is_remote = isinstance(feature_cache.store, RemoteStore)
    if is_remote and method == "forkserver":
        pytest.skip("where another test has started the fork server, that does not know this S3 server's address")
    with multiprocessing.get_context(method).Pool(1) as pool:
        reading = pool.apply_async(read_in_worker, (feature_cache,))
        if is_remote and method == "fork":  # Without the refusal it would hang.
            with pytest.raises(CacheError, match=r"forked[\s\S]*forkserver"):
                reading.get(20)
        else:
            there = reading.get(60)
            np.testing.assert_array_equal(there[0], here[0])
            np.testing.assert_array_equal(there[1], here[1])
        pool.close()
        pool.join()  # before the block's SIGTERM, which workers do not get where a trainer has started the fork server


def test_only_committed_videos_are_there(plain: Path, place: Place, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "broken")
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


@pytest.mark.parametrize("codec", ["float16", "int8", "logit", "spectral"])
@pytest.mark.parametrize("labels", [None, labels_of({7: 70})], ids=["no labels", "labels"])
def test_export_and_import_give_the_same_bytes(tmp_path: Path, labels: bytes | None, codec: str) -> None:
    write_video(open_writer(tmp_path / "a", labels, codec=fitted_codec(codec)), "7", 70)
    for name in ("calibration.json", "footage.json", "README.md", "extraction.json", "skipped.json"):
        (tmp_path / "a" / name).write_text(f'["{name}"]')
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "x.h5")]) == 0
    assert main(["import", str(tmp_path / "x.h5"), str(tmp_path / "b")]) == 0
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", "x.h5"}


def test_a_folder_name_finds_the_file_beside_it(plain: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(plain), tmp_path / "train.h5")
    assert FeatureCache.open(tmp_path / "train").video_names() == ["1", "2"]
    shutil.copytree(plain, tmp_path / "train")
    assert FeatureCache.open(tmp_path / "train").path == tmp_path / "train"


def test_any_hdf5_reader_opens_it(original: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(original), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        maps = file["videos/2/mask_features"]
        assert maps.chunks == (1, *maps.shape[1:]) and maps.fletcher32
        np.testing.assert_array_equal(maps[3], stored_maps(FeatureCache.open(original), 5, 2)[3])
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


def test_a_flipped_bit_in_the_index_of_frames_never_changes_what_is_read(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.h5"
    export_hdf5(FeatureCache.open(plain), file)
    content, rng = file.read_bytes(), np.random.default_rng(0)
    names = FeatureCache.open(plain).video_names()
    truth = [FeatureCache.open(plain).video(name).mask_features() for name in names]
    # Where HDF5's two kinds of index begin: fixed arrays, and B-trees in older formats of the file.
    starts = [match.start() for match in re.finditer(b"FADB|TREE", content)]
    for position in (start + offset for start in starts for offset in range(8, 300, 3)):
        damaged = bytearray(content)
        damaged[min(position, len(content) - 1)] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            found = [FeatureCache.open(file).video(name).mask_features() for name in names]
        except VitaCacheError:
            continue
        assert all(map(np.array_equal, found, truth)), position


def test_without_room_nothing_is_exported_or_imported(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_hdf5(FeatureCache.open(plain), tmp_path / "x.h5")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CacheError, match="does not fit on the disk"):
        export_hdf5(FeatureCache.open(plain), tmp_path / "y.h5")
    with pytest.raises(CacheError, match="does not fit on the disk"):
        import_hdf5(tmp_path / "x.h5", tmp_path / "again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.h5"]


@pytest.mark.parametrize("name", ["annotations.json", "codec/basis", "detector/class_embed.bias", "attributes.json"])
def test_damage_beside_the_frames_is_found_too(tmp_path: Path, name: str) -> None:
    export_hdf5(FeatureCache.open(write_cache(tmp_path / "a", "logit")), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        offset = file[name].id.get_chunk_info(0).byte_offset
    flip_bit(tmp_path / "x.h5", offset + 5)
    with pytest.raises(CorruptData, match="unreadable"):
        feature_cache = FeatureCache.open(tmp_path / "x.h5")
        found = [finding.rule for finding in verify_root(feature_cache)]
        assert found == [{"codec/basis": "codec", "detector/class_embed.bias": "detector"}.get(name, "labels")]
        print(feature_cache.labels_json(), feature_cache.codec, feature_cache.heads)


def test_frames_that_were_never_written_to_the_file_are_not_zeros(original: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(original), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        dataset = file["videos/2/mask_features"]
        shape, dtype = dataset.shape, dataset.dtype
        del file["videos/2/mask_features"]
        file.create_dataset("videos/2/mask_features", shape, dtype, chunks=(1, *shape[1:]), fletcher32=True)[:4] = 1
    with pytest.raises(CorruptData, match=r"video '2', mask_features: 4 of 5 frames are there[\s\S]*cache export"):
        FeatureCache.open(tmp_path / "x.h5").video("2").mask_features([0])


def test_export_refuses_names_that_would_not_be_read_again(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"x\.hdf5[\s\S]*export to x\.h5"):
        export_hdf5(FeatureCache.open(plain), tmp_path / "x.hdf5")


def test_export_and_import_never_overwrite(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"thesis")
    with pytest.raises(CacheError, match="exists already"):
        export_hdf5(FeatureCache.open(plain), tmp_path / "x.h5")
    with pytest.raises(CorruptData, match="not a readable HDF5 file"):
        FeatureCache.open(tmp_path / "x.h5")
    (tmp_path / "x.h5").unlink()
    with pytest.raises(CacheError, match="no feature cache here"):
        FeatureCache.open(tmp_path / "x.h5")
    export_hdf5(FeatureCache.open(plain), tmp_path / "new" / "x.h5")
    with pytest.raises(CacheError, match="not empty"):
        import_hdf5(tmp_path / "new" / "x.h5", plain)


def test_an_export_that_fails_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(plain, tmp_path / "damaged")
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
        ("az://container/a/", "az://container/a"),
        ("s3://bucket//a//b/", "s3://bucket/a/b"),  # as `Path` has it
        ("caches/a#1", None),
    ],
)
def test_addresses_are_told_from_paths(path: Path | str, url: str | None) -> None:
    assert remote_url(path) == url


@pytest.mark.parametrize("mark", ["#", "?"])
def test_an_address_does_not_end_early(mark: str) -> None:
    """Else the caches of both splits, and those of `a#1` and `a#2`, would be the one at `s3://bucket/a`."""
    with pytest.raises(CacheError, match=rf"^s3://bucket/a\{mark}1/train: in an address"):
        remote_url(Path(f"s3://bucket/a{mark}1") / "train")


# Staging


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_staging_copies_what_is_missing(
    original: Path, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    address = str(original)
    if kind == "s3":
        address = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
        upload(original, address)
    assert main(["stage", address, str(tmp_path / "ssd")]) == 0
    assert files_below(tmp_path / "ssd") == files_below(original)
    shutil.rmtree(tmp_path / "ssd/videos/2")
    kept = (tmp_path / "ssd/videos/1/zarr.json").stat().st_ino
    stage(address, tmp_path / "ssd")
    assert files_below(tmp_path / "ssd") == files_below(original)
    assert (tmp_path / "ssd/videos/1/zarr.json").stat().st_ino == kept


@pytest.mark.parametrize("length", [4, 5], ids=["another length", "other bytes in the same number of frames"])
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_videos_that_have_changed_are_staged_anew(
    kind: str, length: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = write_cache(tmp_path / "a", "logit")
    address = str(folder)
    if kind == "s3":
        address = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
        upload(folder, address)
    copy = local_copy(Path(address), str(tmp_path / "ssd"))
    before = files_below(copy)
    assert before == files_below(folder)
    shutil.rmtree(folder / "videos/2")
    write_video(open_writer(folder, codec=fitted_codec("logit")), "2", length, seed=99)
    if kind == "s3":
        for name in files_below(folder, "videos/2/**/*"):
            RemoteStore(url=address).put(name, folder / name)
    assert local_copy(Path(address), str(tmp_path / "ssd")) == copy
    after = files_below(copy, "videos/**/*")
    assert after == files_below(folder, "videos/**/*") and after.items() - before.items()


def test_an_hdf5_file_is_staged_as_it_is(plain: Path, tmp_path: Path) -> None:
    export_hdf5(FeatureCache.open(plain), tmp_path / "train.h5")
    copy = local_copy(tmp_path / "train", str(tmp_path / "ssd"))
    assert copy.is_relative_to(tmp_path / "ssd") and FeatureCache.open(copy).video_names() == ["1", "2"]
    kept = copy.stat().st_ino
    assert local_copy(tmp_path / "train", str(tmp_path / "ssd")).stat().st_ino == kept
    os.utime(tmp_path / "train.h5")
    assert local_copy(tmp_path / "train", str(tmp_path / "ssd")).stat().st_ino != kept


def test_a_cache_is_not_staged_into_itself_nor_onto_a_full_disk(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_copy(plain, str(plain.parent)) == plain
    with pytest.raises(CacheError, match="into itself"):
        stage(plain, plain)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CacheError, match=r"does not fit on the disk .expected 0\.0\d MB, got 0\.00 MB free"):
        stage(plain, tmp_path / "ssd")
    assert not (tmp_path / "ssd/zarr.json").exists()


def test_videos_added_later_are_uploaded_alone(plain: Path, bucket: str, tmp_path: Path) -> None:
    address, folder = f"{bucket}/{tmp_path.name}", shutil.copytree(plain, tmp_path / "a")
    upload(folder, address)
    write_video(open_writer(folder, labels_of({**LENGTHS, 3: 4})), "3", 4)
    upload(folder, address)
    assert FeatureCache.open(address).video_names() == ["1", "2", "3"]
    assert FeatureCache.open(address).labels_json() == labels_of({**LENGTHS, 3: 4})


def test_other_features_are_neither_staged_nor_uploaded_over(plain: Path, bucket: str, tmp_path: Path) -> None:
    address, other = f"{bucket}/{tmp_path.name}", tmp_path / "other"
    upload(plain, address)
    open_writer(other, fingerprint=replace(FINGERPRINT, short_edge=32))
    with pytest.raises(FingerprintMismatch, match="short edge"):
        stage(address, other)
    with pytest.raises(FingerprintMismatch, match="short edge"):
        upload(other, address)


def test_damage_in_the_object_store_is_found(plain: Path, bucket: str, tmp_path: Path) -> None:
    address, folder = f"{bucket}/{tmp_path.name}", shutil.copytree(plain, tmp_path / "a")
    flip_bit(folder / "videos/2/frame_queries/c.0.0.0.0", 3 * (3 * 4 * 6 * 2 + 4) + 8)
    upload(folder, address)
    video = FeatureCache.open(address).video("2")
    assert video.frame_queries([2, 4]).shape[0] == 2
    with pytest.raises(CorruptData, match="frame 3: checksum"):
        video.frame_queries([3])
    with pytest.raises(CacheError, match="no feature cache here"):
        FeatureCache.open(f"{bucket}/nothing")


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{", '{"attributes": 3}'])
def test_damaged_metadata_in_the_object_store_harm_their_video_alone(
    plain: Path, bucket: str, tmp_path: Path, content: str
) -> None:
    address = f"{bucket}/{tmp_path.name}"
    upload(plain, address)
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

    do_PUT = do_GET

    def log_message(self, *arguments: object) -> None: ...


def test_a_refused_request_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), _Denying) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        store = RemoteStore(url="s3://private/a")
        for request, what in ((store.names, "listed"), (store.listing, "listed"), (store.get, "read")):
            with pytest.raises(CacheError, match=rf"s3://private/a/videos.* cannot be {what}[\s\S]*credentials"):
                request("videos")
        server.shutdown()


@pytest.mark.parametrize("path", ["abfs://c@account/a", Path("s3a://bucket/a"), "S3://bucket/a"])
def test_addresses_of_other_kinds_are_no_folders(path: Path | str) -> None:
    with pytest.raises(CacheError, match=r"not an address that is known \(expected s3://"):
        FeatureCache.open(path)


@pytest.mark.parametrize(
    "arguments",
    [("export", "plain", "s3://b/x.h5"), ("import", "x.h5", "s3://b/x"), ("stage", "plain", "s3://b/x")],
)
def test_what_is_written_to_a_disk_is_not_written_to_an_address(
    plain: Path,
    arguments: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor to a folder `s3:`, unnoticed."""
    monkeypatch.chdir(tmp_path)
    verb, source, target = arguments
    assert main([verb, str(plain) if source == "plain" else source, target]) == 2
    assert "not written to an address" in (said := capsys.readouterr().err) and "cache upload" in said
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_not_there_is_told_as_such(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "s3://no-such-bucket/a"]) == 2
    assert "s3://no-such-bucket/a/zarr.json: cannot be read: The specified bucket" in (said := capsys.readouterr().err)
    assert "check the bucket's name" in said


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        ({"AWS_ENDPOINT": "denying"}, "AWS_ALLOW_HTTP=true"),
        (
            {"AWS_ENDPOINT": "denying", "AWS_ALLOW_HTTP": "true", "AWS_METADATA_ENDPOINT": "denying"},
            "AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_ENDPOINT": "silent", "AWS_ALLOW_HTTP": "true", "AWS_TIMEOUT": "50ms"}, "AWS_TIMEOUT=5m"),
        ({"AWS_ENDPOINT": "closed", "AWS_ALLOW_HTTP": "true"}, "the server cannot be reached"),
    ],
    ids=["http", "credentials", "timeout", "unreachable"],
)
def test_what_keeps_from_a_store_is_told_with_what_to_do(
    variables: dict[str, str], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    if "AWS_METADATA_ENDPOINT" not in variables:
        variables = {**variables, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with HTTPServer(("127.0.0.1", 0), _Denying) as server, socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as other:
            closed = other.getsockname()[1]
        ports = {"denying": server.server_port, "silent": silent.getsockname()[1], "closed": closed}
        Thread(target=server.serve_forever, daemon=True).start()
        for name, value in variables.items():
            monkeypatch.setenv(name, f"http://127.0.0.1:{ports[value]}" if value in ports else value)
        obstore = pytest.importorskip("obstore.store", reason="needs obstore: pip install '.[remote]'")
        once = obstore.from_url("s3://bucket/a", retry_config={"max_retries": 0})
        with pytest.raises(CacheError, match=rf"cannot be read[\s\S]*hint: .*{hint}"), in_words("s3://bucket/a"):
            once.get("zarr.json")
        server.shutdown()


def test_a_plain_web_server_is_refused_with_a_hint() -> None:
    with pytest.raises(CacheError, match=r"https://example\.org/a: a web server does not list[\s\S]*hint: .*s3://"):
        FeatureCache.open("https://example.org/a")
