"""The fast shard reader and zarr-python must return the same bytes and refuse the same damage."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache.errors import CorruptData
from cache.reader import FeatureCache
from cache.storage.frames import FrameArray, ZarrFrames, open_frames
from cache.storage.shard_layout import decode_index, encode_index, index_bytes
from cache.storage.shard_writer import ShardWriter
from cache.storage.shards import ShardedFrames
from tests.cache_samples import attributes_of, flip_bit, open_writer, random_features, write_video

NUM_FRAMES = 150
Opener = Callable[[Path], FrameArray]


def open_with_zarr(folder: Path) -> FrameArray:
    return ZarrFrames.of(folder, json.loads((folder / "zarr.json").read_bytes()))


@pytest.fixture(params=[open_frames, open_with_zarr], ids=["fast", "zarr"])
def opener(request: pytest.FixtureRequest) -> Opener:
    return request.param


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "features"
    write_video(open_writer(path), "7", NUM_FRAMES)
    return path / "videos" / "7"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A cache of its own for the test to damage: 70 frames, shards of 64 and 6."""
    write_video(open_writer(tmp_path / "features"), "7", 70)
    return tmp_path / "features" / "videos" / "7" / "mask_features"


def foreign_array(folder: Path, values: NDArray[Any], **changes: Any) -> Path:
    """A sharded array written by zarr-python alone, in the prescribed layout but for `changes`."""
    layout: dict[str, Any] = {
        "chunks": (1, *values.shape[1:]),
        "shards": (4, *values.shape[1:]),
        "compressors": [Crc32cCodec()],
        "filters": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
        "config": {"write_empty_chunks": True},
    }
    array = zarr.create_array(store=str(folder), shape=values.shape, dtype=values.dtype, **{**layout, **changes})
    array[...] = values
    return folder


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "|i1", "|u1", "<i2"])
@pytest.mark.parametrize("compressed", [False, True])
def test_metadata_are_those_that_zarr_writes(tmp_path: Path, dtype: str, compressed: bool) -> None:
    values = np.ones((10, 4, 3, 2), dtype)
    fill = (
        float("nan") if values.dtype.kind == "f" else (np.iinfo(dtype).max if dtype == "|u1" else np.iinfo(dtype).min)
    )
    compressors = [*([ZstdCodec(level=1, checksum=False)] if compressed else []), Crc32cCodec()]
    axes = ("T", "R", "H", "W")
    theirs = foreign_array(
        tmp_path / "theirs",
        values,
        shards=(10, 4, 3, 2),
        compressors=compressors,
        fill_value=fill,
        dimension_names=axes,
    )
    ShardWriter(tmp_path / "ours", 10, values, axes, compressed=compressed)
    ours, expected = ((folder / "zarr.json").read_text() for folder in (tmp_path / "ours", theirs))
    assert json.loads(ours) == json.loads(expected)


def test_a_written_video_has_the_layout_of_the_fast_reader(stored: Path) -> None:
    assert isinstance(open_frames(stored / "mask_features"), ShardedFrames)
    assert isinstance(open_frames(stored / "frame_queries"), ShardedFrames)


def crc32c(content: bytes) -> int:
    """Castagnoli's polynomial, bit by bit (RFC 3720, appendix B.4: 32 bytes of zeros give 0x8A9136AA)."""
    remainder = 0xFFFFFFFF
    for byte in content:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


@pytest.mark.parametrize("frame", [0, 63, 64, 149])
def test_a_reader_made_from_the_specification_alone(stored: Path, frame: int) -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA
    content = (stored / "frame_queries" / f"c.{frame // 64}.0.0.0").read_bytes()
    index, index_crc = content[-16 * 64 - 4 : -4], content[-4:]
    assert crc32c(index) == int.from_bytes(index_crc, "little")
    offset, size = struct.unpack_from("<QQ", index, 16 * (frame % 64))
    chunk, crc = content[offset : offset + size - 4], content[offset + size - 4 : offset + size]
    assert crc32c(chunk) == int.from_bytes(crc, "little")
    expected = random_features(NUM_FRAMES)[0][frame].astype(np.float16)
    np.testing.assert_array_equal(np.frombuffer(chunk, "<f2").reshape(expected.shape), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.integers(0, NUM_FRAMES - 1), max_size=12))
def test_any_frames_in_any_order(stored: Path, opener: Opener, frames: list[int]) -> None:
    queries, _ = random_features(NUM_FRAMES)
    read = opener(stored / "frame_queries").read(frames)
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, queries.astype(np.float16)[frames])


def test_all_frames_at_once_cross_shards(stored: Path, opener: Opener) -> None:
    _, maps = random_features(NUM_FRAMES)
    read = opener(stored / "mask_features").read(range(NUM_FRAMES))
    np.testing.assert_array_equal(read, maps.astype(np.float16)[:, :, :7, :11])


def test_reads_into_a_given_array(stored: Path, opener: Opener) -> None:
    array = opener(stored / "frame_queries")
    out = np.full((3, *array.shape[1:]), 9, np.float16)
    assert array.read([149, 0, 64], out) is out
    np.testing.assert_array_equal(out, random_features(NUM_FRAMES)[0].astype(np.float16)[[149, 0, 64]])
    with pytest.raises(ValueError, match="C-contiguous"):
        array.read([1, 2, 3], out[:, ::-1])
    with pytest.raises(ValueError, match="float16"):
        array.read([1, 2, 3], out.astype(np.float32))


@pytest.mark.parametrize("frames", [[NUM_FRAMES], [0, -1]])
def test_frames_outside_the_video_are_refused(stored: Path, opener: Opener, frames: list[int]) -> None:
    with pytest.raises(IndexError, match=str(NUM_FRAMES)):
        opener(stored / "frame_queries").read(frames)


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8", "int16"])
def test_other_element_types(tmp_path: Path, opener: Opener, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 100, (10, 3, 5)).astype(dtype)
    folder = foreign_array(tmp_path / "x", values)
    array = opener(folder)
    np.testing.assert_array_equal(array.read([9, 2, 3, 4]), values[[9, 2, 3, 4]])
    assert isinstance(open_frames(folder), ShardedFrames)


@pytest.mark.parametrize(
    "changes",
    [
        {"compressors": [ZstdCodec(level=1)]},
        {"compressors": None},
        {"chunks": (2, 3, 5)},
        {"chunks": (1, 3, 2), "shards": (2, 3, 4)},
        {"shards": None},
        {"chunk_key_encoding": {"name": "default", "separator": "/"}},
    ],
    ids=["zstd", "no checksum", "two frames a chunk", "chunks within a frame", "no shards", "other keys"],
)
def test_unknown_layouts_go_through_zarr(tmp_path: Path, changes: dict[str, Any]) -> None:
    values = np.random.default_rng(0).standard_normal((10, 3, 5)).astype(np.float32)
    array = open_frames(foreign_array(tmp_path / "x", values, **changes))
    assert isinstance(array, ZarrFrames)
    np.testing.assert_array_equal(array.read([9, 2, 3]), values[[9, 2, 3]])


def frame_bytes(folder: Path) -> int:
    return int(np.prod(open_frames(folder).shape[1:])) * 2


def test_flipped_bit_in_the_data(damaged: Path, opener: Opener) -> None:
    file = damaged / "c.0.0.0.0"
    flip_bit(file, 3 * (frame_bytes(damaged) + 4) + 100)
    array = opener(damaged)
    assert array.read([2, 4]).shape[0] == 2
    with pytest.raises(CorruptData, match=r"video '7', frame 3\b"):
        array.read([2, 3, 4])


def test_an_index_that_points_beyond_the_file(damaged: Path) -> None:
    file, size = damaged / "c.0.0.0.0", frame_bytes(damaged) + 4
    length = index_bytes(64)
    content = file.read_bytes()
    entries = decode_index(content[-length:])
    assert entries is not None
    file.write_bytes(content[:-length] + encode_index([entries[0], (1 << 63, size), *entries[2:]], 64))
    with pytest.raises(CorruptData, match=r"frame 1: shard ends too early"):
        open_frames(damaged).read([0, 1])


@pytest.mark.parametrize("place", [0, 600_000, 1_199_999])
def test_flipped_bit_in_any_block_of_a_large_frame(tmp_path: Path, place: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (2, 1, 1000, 1200), np.uint8)
    writer = ShardWriter(tmp_path, 2, values, ("T", "R", "H", "W"))
    writer.append(values)
    writer.finish()
    np.testing.assert_array_equal(open_frames(tmp_path).read([1, 0]), values[::-1])
    flip_bit(tmp_path / "c.0.0.0.0", place)
    with pytest.raises(CorruptData, match=r"frame 0: checksum mismatch"):
        open_frames(tmp_path).read([1, 0])


def test_flipped_bit_in_the_index(damaged: Path, opener: Opener) -> None:
    file = damaged / "c.1.0.0.0"
    flip_bit(file, file.stat().st_size - 20)
    array = opener(damaged)
    assert array.read([0, 63]).shape[0] == 2
    with pytest.raises(CorruptData, match=r"frame 64\b"):
        array.read([64])


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_truncated_shard(damaged: Path, opener: Opener, kept: int) -> None:
    file = damaged / "c.0.0.0.0"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptData, match=r"c\.0\.0\.0\.0|mask_features"):
        opener(damaged).read([5])


def test_a_file_that_changes_is_verified_again(damaged: Path) -> None:
    array = open_frames(damaged)
    array.read(range(70))
    array = pickle.loads(pickle.dumps(array))
    flip_bit(damaged / "c.0.0.0.0", 3 * (frame_bytes(damaged) + 4) + 100)
    assert array.read([2, 4, 64]).shape[0] == 3
    with pytest.raises(CorruptData, match=r"frame 3: checksum mismatch"):
        array.read([2, 3, 4])


def test_shard_truncated_after_its_index_was_read(damaged: Path) -> None:
    array = open_frames(damaged)
    array.read([5])
    with (damaged / "c.0.0.0.0").open("r+b") as file:
        file.truncate(5 * (frame_bytes(damaged) + 4) + 7)
    with pytest.raises(CorruptData, match="checksum mismatch in the shard's index"):
        array.read([5])
    assert array.read([64]).shape[0] == 1


def test_missing_shard_is_never_read_as_zeros(damaged: Path, opener: Opener) -> None:
    (damaged / "c.1.0.0.0").unlink()
    array = opener(damaged)
    assert array.read([63]).shape[0] == 1
    with pytest.raises(CorruptData, match=r"c\.1\.0\.0\.0.*frame 69"):
        array.read([69])


def test_frame_that_was_never_written(tmp_path: Path, opener: Opener) -> None:
    write_video(open_writer(tmp_path / "features"), "7", 8)
    folder = tmp_path / "features" / "videos" / "7" / "mask_features"
    written = zarr.open_array(str(folder), mode="r")[:5]
    (folder / "c.0.0.0.0").unlink()
    zarr.open_array(str(folder), mode="r+")[:5] = written
    array = opener(folder)
    np.testing.assert_array_equal(array.read([4]), written[4:5])
    with pytest.raises(CorruptData, match=r"never written|frame 6\b"):
        array.read([6])


def test_array_of_another_shape_than_the_video(tmp_path: Path) -> None:
    path = tmp_path / "features"
    write_video(open_writer(path), "7", 8)
    metadata = path / "videos" / "7" / "zarr.json"
    text = json.loads(metadata.read_text())
    text["attributes"] |= attributes_of(9).to_json()
    metadata.write_text(json.dumps(text))
    with pytest.raises(CorruptData, match="does not fit"):
        FeatureCache.open(path).video("7").frame_queries()


@pytest.mark.parametrize("content", ["{", "{}", "[]", "null", '{"shape": [3, 2], "data_type": 7}'])
def test_unreadable_array_metadata(damaged: Path, content: str) -> None:
    (damaged / "zarr.json").write_text(content)
    with pytest.raises(CorruptData, match="metadata"):
        open_frames(damaged)


@pytest.mark.parametrize("frames_per_shard", [0, -1, 2**40, "64", None])
def test_impossible_shards(damaged: Path, frames_per_shard: object) -> None:
    metadata = json.loads((damaged / "zarr.json").read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = frames_per_shard
    (damaged / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(CorruptData):
        open_frames(damaged).read([0])
