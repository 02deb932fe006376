"""Codecs in a cache: saved and loaded, told apart, refused when damaged; and the container of compressed frames."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache import sink
from cache.codecs import Codec, codec_identity, select_codec
from cache.codecs.logit import Logit
from cache.errors import CacheError, CorruptData
from cache.reader import FeatureCache
from cache.storage.frames import open_frames
from cache.storage.shards import ShardedFrames
from cache.upkeep.verification import verify_root, verify_video
from cache.writer import CacheWriter
from tests.cache_samples import (
    FINGERPRINT,
    attributes_of,
    files_below,
    fitted_codec,
    flip_bit,
    open_writer,
    random_features,
    random_heads,
    write_video,
)

NAMES = ("float16", "int8", "logit", "spectral")


def write_cache(path: Path, codec: Codec, num_frames: int = 70) -> Path:
    writer = open_writer(path, codec=codec)
    queries, maps = random_features(num_frames)
    with writer.video("7", attributes_of(num_frames)) as sink:
        sink.append(queries, maps)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_carries_its_codec(tmp_path: Path, name: str) -> None:
    codec = fitted_codec(name)
    feature_cache = FeatureCache.open(write_cache(tmp_path / "features", codec))
    loaded = pickle.loads(pickle.dumps(feature_cache)).codec
    assert loaded.name == name and loaded.parameters == codec.parameters
    assert loaded.arrays.keys() == codec.arrays.keys()
    for key, array in codec.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[key], array)
    assert codec_identity(loaded) == codec_identity(codec) == feature_cache.fingerprint.codec
    stored = feature_cache.video("7").mask_features([69, 0, 3])
    np.testing.assert_array_equal(stored, codec.encode(random_features(70)[1][[69, 0, 3], :, :7, :11]))
    assert list(verify_root(feature_cache)) == []


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    writer = open_writer(tmp_path / "features", codec=fitted_codec(name))
    queries, maps = random_features(4)
    maps[2, 1, 3, 3] = np.nan
    with (
        pytest.raises(CacheError, match=r"video '7', frame 2: mask features are not finite"),
        writer.video("7", attributes_of(4)) as sink,
    ):
        sink.append(queries, maps)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_depend_neither_on_threads_nor_on_batches(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for threads, step in ((1, 9), (3, 9), (3, 2), (1, 1)):
        monkeypatch.setattr(sink, "ENCODERS", threads)
        path = tmp_path / f"{threads}-{step}"
        write_video(open_writer(path, codec=fitted_codec(name)), "1", 9, step=step)
        contents.append(files_below(path, "videos/1/*/c.*"))
    assert contents[0] and all(content == contents[0] for content in contents)


def test_another_fit_is_another_cache(tmp_path: Path) -> None:
    first, second = fitted_codec("logit"), fitted_codec("logit")
    assert isinstance(second, Logit)
    assert codec_identity(first) == codec_identity(second)
    second = replace(second, mean_C=second.mean_C + np.float32(1))
    assert codec_identity(first) != codec_identity(second)
    write_cache(tmp_path / "features", first)
    with pytest.raises(CacheError, match="mask feature codec: logit:"):
        write_cache(tmp_path / "features", second)
    with pytest.raises(CacheError, match="codec differs from the fingerprint"):
        CacheWriter.open(
            tmp_path / "x",
            fingerprint=replace(FINGERPRINT, codec=codec_identity(first)),
            heads=random_heads(),
            codec=second,
            labels_json=None,
        )


def test_a_damaged_codec_is_found(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "features", fitted_codec("logit"))
    array = zarr.open_array(str(path / "codec" / "mean"), mode="r+")
    array[0] = 5.0
    findings = list(verify_root(FeatureCache.open(path)))
    assert [finding.rule for finding in findings] == ["codec"] and "disagree" in findings[0].message


@pytest.mark.parametrize(("array", "rule"), [("codec/mean", "codec"), ("detector/class_embed.bias", "detector")])
def test_what_is_lost_is_told_once_with_its_place(tmp_path: Path, array: str, rule: str) -> None:
    path = write_cache(tmp_path / "features", fitted_codec("logit"))
    shutil.rmtree(path / array)
    feature_cache = FeatureCache.open(path)
    findings = [*verify_root(feature_cache), *verify_video(feature_cache, feature_cache.video_names()[0])]
    assert [finding.rule for finding in findings] == [rule]
    assert findings[0].message.startswith(f"{path / array.partition('/')[0]}: ") and "restore" in findings[0].message


FIT = {"projection": (3, 6), "basis": (6, 3), "mean": (6,)}
PARAMETERS = {"num_wide": 1, "relative_step": 0.01, "identity_share": 0.01}


@pytest.mark.parametrize(
    ("name", "parameters", "shapes", "match"),
    [
        ("float16", {}, {"mean": (6,)}, "no parameters"),
        ("int8", {"x": 1}, {"step": (6,), "offset": (6,)}, "no parameters"),
        ("int8", {}, {"step": (6,)}, "wrong arrays"),
        ("int8", {}, {"step": (6,), "offset": (5,)}, "'offset' does not fit"),
        ("int8", {}, {"step": (6, 1), "offset": (6,)}, "'step' does not fit"),
        ("logit", PARAMETERS, FIT | {"basis": (6, 4)}, "'basis' does not fit"),
        ("logit", PARAMETERS | {"num_wide": 4}, FIT, "num_wide"),
        ("logit", PARAMETERS | {"num_wide": "1"}, FIT, "num_wide.*'1'"),
        ("logit", PARAMETERS | {"num_wide": 0.5}, FIT, "num_wide"),
        ("logit", {}, FIT, "parameters"),
        ("spectral", PARAMETERS, FIT, "wrong arrays"),
        ("spectral", PARAMETERS, FIT | {"plane": (2,)}, "impossible planes"),  # the same one twice
        ("spectral", PARAMETERS | {"num_wide": 2}, FIT | {"plane": (1,)}, "num_wide"),
        ("spectral", {}, FIT | {"plane": (1,)}, "parameters"),
    ],
)
def test_codecs_that_do_not_fit_together_are_refused(
    name: str, parameters: dict[str, Any], shapes: dict[str, tuple[int, ...]], match: str
) -> None:
    arrays = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    with pytest.raises(CorruptData, match=match):
        select_codec(name, parameters, arrays)


def test_fits_that_are_not_numbers_are_refused() -> None:
    arrays = {"step": np.ones(3, np.float32), "offset": np.full(3, np.nan, np.float32)}
    with pytest.raises(CorruptData, match="not finite"):
        select_codec("int8", {}, arrays)
    with pytest.raises(CorruptData, match="positive"):
        select_codec("int8", {}, {"step": np.zeros(3, np.float32), "offset": np.zeros(3, np.float32)})
    with pytest.raises(CacheError, match="unknown codec"):
        select_codec("int9", {}, {})


# The container


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_cache(tmp_path_factory.mktemp("compressed") / "features", fitted_codec("logit"))
    return path / "videos" / "7" / "mask_features"


def test_any_zarr_reader_opens_a_compressed_cache(compressed: Path) -> None:
    array = open_frames(compressed)
    assert isinstance(array, ShardedFrames) and array.compressed
    np.testing.assert_array_equal(array.read(range(70)), zarr.open_array(str(compressed), mode="r")[...])
    np.testing.assert_array_equal(array.read([69, 3, 3, 64]), array.read(range(70))[[69, 3, 3, 64]])


def test_damage_in_compressed_frames_is_found(compressed: Path, tmp_path: Path) -> None:
    index = np.frombuffer((compressed / "c.0.0.0.0").read_bytes()[-16 * 64 - 4 : -4], "<u8").reshape(-1, 2)
    offset, size = (int(number) for number in index[5])
    for place, position in enumerate((offset, offset + size // 2, offset + size - 1)):
        damaged = shutil.copytree(compressed, tmp_path / str(place))
        flip_bit(damaged / "c.0.0.0.0", position)
        array = open_frames(damaged)
        assert array.read([4, 6]).shape[0] == 2
        with pytest.raises(CorruptData, match=r"checksum mismatch"):
            array.read([4, 5, 6])
    short = shutil.copytree(compressed, tmp_path / "short")
    array = open_frames(short)
    array.read([0])
    with (short / "c.0.0.0.0").open("r+b") as file:
        file.truncate(offset + 3)
    with pytest.raises(CorruptData, match=r"checksum mismatch in the shard's index"):  # the file has changed
        array.read([5])


def test_compressed_frames_are_verified_at_every_reading(compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "rotten")
    array, file = open_frames(folder), folder / "c.0.0.0.0"
    array.read([5])
    state = file.stat()
    flip_bit(file, int.from_bytes(file.read_bytes()[-16 * 64 - 4 + 16 * 5 :][:8], "little") + 9)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CorruptData, match=r"checksum mismatch"):
        array.read([5])


def test_a_chunk_that_is_no_frame_is_refused(tmp_path: Path) -> None:
    """Sound checksums, but Zstandard of another length, of a promised petabyte, or no Zstandard."""
    from cache.storage.compression import compress
    from cache.storage.shard_layout import crc32c, encode_index

    path = write_cache(tmp_path / "features", fitted_codec("logit"), num_frames=2)
    folder = path / "videos" / "7" / "mask_features"
    endless = bytes.fromhex("28b52ffd") + b"\xe0" + (2**50).to_bytes(8, "little") + b"\1\0\0"
    for content in (compress(np.zeros(7, np.int8)), endless, b"no zstandard here"):
        chunk = content + crc32c(content).to_bytes(4, "little")
        (folder / "c.0.0.0.0").write_bytes(chunk + encode_index([(0, len(chunk))], 2))
        with pytest.raises(CorruptData, match=r"does not unpack to a frame"):
            open_frames(folder).read([0])
