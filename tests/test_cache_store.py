"""Writing and reading a cache: round trips, commit and resume after crashes, refusals, inspection."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from cache.__main__ import main
from cache.codecs import select_codec
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.errors import CacheError, CorruptData, FormatVersionError, IncompleteVideo
from cache.layout import METADATA, VideoAttributes, View, crop_map, video_group_name
from cache.preload import available_bytes, held_bytes, require_memory
from cache.reader import FeatureCache
from cache.storage.shard_layout import crc32c
from cache.storage.shard_writer import ShardWriter
from cache.upkeep.verification import verify_root
from cache.writer import CacheWriter
from tests.cache_samples import (
    FINGERPRINT,
    MAP_HW,
    NUM_LAYERS,
    VIDEOS,
    attributes_of,
    files_below,
    fitted_codec,
    flip_bit,
    labels_of,
    open_writer,
    random_features,
    random_heads,
    write_all_pending,
    write_until_killed,
    write_video,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features"


def array_files(path: Path) -> dict[str, bytes]:
    """Every file below videos/, but for the groups' own metadata."""
    return files_below(path, "videos/*/*/*")


# Round trips


@pytest.mark.parametrize(("num_frames", "step"), [(1, 1), (5, 2), (64, 64), (65, 3), (150, 70)])
def test_what_is_written_is_read(path: Path, num_frames: int, step: int) -> None:
    write_video(open_writer(path), "7", num_frames, step=step)
    video = FeatureCache.open(path).video("7")
    queries, maps = random_features(num_frames)
    assert video.attributes == attributes_of(num_frames)
    np.testing.assert_array_equal(video.frame_queries(), queries.astype(np.float16))
    np.testing.assert_array_equal(video.mask_features(), maps[:, :, :7, :11].astype(np.float16))
    np.testing.assert_array_equal(video.mask_features([num_frames - 1, 0]), video.mask_features()[[-1, 0]])


def test_any_zarr_reader_opens_it(path: Path) -> None:
    write_video(open_writer(path), "7", 70)
    root = zarr.open_group(str(path), mode="r")
    assert root.attrs["format_version"] == 1
    queries = root["videos/7/frame_queries"]
    assert isinstance(queries, zarr.Array)
    assert (queries.chunks, queries.shards) == ((1, *queries.shape[1:]), (64, *queries.shape[1:]))
    np.testing.assert_array_equal(queries[:], random_features(70)[0].astype(np.float16))
    assert np.isnan(queries.fill_value)


def test_heads_labels_and_codec_travel_with_the_cache(path: Path) -> None:
    labels = labels_of({7: 5})
    open_writer(path, labels)
    feature_cache, heads = FeatureCache.open(path), random_heads()
    assert feature_cache.labels_json() == labels
    assert feature_cache.heads.category_names == heads.category_names
    assert feature_cache.heads.arrays.keys() == heads.arrays.keys()
    for name, array in heads.arrays.items():
        np.testing.assert_array_equal(feature_cache.heads.arrays[name], array)
    maps = random_features(2)[1]
    codec = feature_cache.codec
    np.testing.assert_allclose(codec.decode(codec.encode(maps)), maps, rtol=2**-11)
    embeddings = np.ones((3, 6), np.float32)
    assert codec.fold(embeddings)[0] is embeddings
    assert codec.stored_channels(6) == 6


def upsampled(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear, four times, between pixel centres (align_corners=False): np.interp along either axis."""

    def along_line(line: NDArray[np.float32]) -> NDArray[np.float64]:
        centres = (np.arange(4 * len(line)) + 0.5) / 4 - 0.5
        return np.interp(centres, np.arange(len(line)), line)

    return np.apply_along_axis(along_line, -1, np.apply_along_axis(along_line, -2, maps))


@pytest.mark.parametrize("image_hw", [(20, 33), (21, 36), (32, 64), (29, 61), (1, 1)])
def test_cropped_maps_upsample_like_whole_ones(image_hw: tuple[int, int]) -> None:
    whole = random_features(1)[1]
    cropped = crop_map(whole, image_hw)
    height, width = image_hw
    assert cropped.shape[-2:] == (min(-(-height // 4) + 1, 8), min(-(-width // 4) + 1, 16))
    expected = upsampled(whole)[..., :height, :width]
    np.testing.assert_array_equal(upsampled(cropped)[..., :height, :width], expected)


def test_views_have_groups_of_their_own(path: Path) -> None:
    view = View(crop=(0, 16, 24, 40), flip=True)
    name = video_group_name(7, view)
    assert name == "7@crop0x16x24x40-flip"
    queries, maps = random_features(3)
    attributes = replace(attributes_of(3), view=view)
    writer = open_writer(path)
    with writer.video(name, attributes) as sink:
        sink.append(queries, maps)
    assert writer.pending(["7", name]) == ["7"]
    assert FeatureCache.open(path).video(name).attributes == attributes
    with (
        pytest.raises(CacheError, match="name and view differ"),
        writer.video("7@edge320", attributes_of(3)),
    ):
        pass


def test_preloaded_videos_stay_in_memory_but_do_not_travel(path: Path) -> None:
    write_video(open_writer(path), "7", 20)
    feature_cache = FeatureCache.open(path, preload=True)
    video = feature_cache.video("7")
    first = video.frame_queries([4, 4, 2]), video.mask_features([1])
    assert len(pickle.dumps(feature_cache)) < 5_000 and len(pickle.dumps(video)) < 5_000
    shutil.rmtree(path / "videos")
    expected = random_features(20)[0].astype(np.float16)[[4, 4, 2]]
    np.testing.assert_array_equal(first[0], expected)
    again = feature_cache.video("7")
    np.testing.assert_array_equal(again.frame_queries([4, 4, 2]), expected)
    np.testing.assert_array_equal(again.mask_features([1]), first[1])
    again.frame_queries()[:] = 0
    np.testing.assert_array_equal(again.frame_queries([4, 4, 2]), expected)
    with pytest.raises(IndexError, match="20"):
        again.frame_queries([-1])


def test_preloading_is_refused_where_memory_is_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(path)
    write_video(writer, "1", 20)
    write_video(writer, "2", 5)
    feature_cache = FeatureCache.open(path, preload=True)
    videos = [feature_cache.video(name) for name in ("1", "2")]
    held = sum(video.frame_queries().nbytes + video.mask_features().nbytes for video in videos)
    assert held_bytes(feature_cache, ["1", "2"]) == held
    assert (available_bytes() or 2**40) > 2**20
    monkeypatch.setattr("cache.preload.available_bytes", lambda: 3 * held)
    require_memory([(feature_cache, ["1", "2"])], 3)
    with pytest.raises(CacheError, match=r"2 videos in the memory of each of 4 processes[\s\S]*cache\.preload=false"):
        require_memory([(feature_cache, ["1", "2"])], 4)


def test_memory_does_not_grow_with_the_video(path: Path) -> None:
    queries, maps = random_features(16, num_channels=64)

    def peak(name: str, num_frames: int) -> int:
        tracemalloc.start()
        with writer.video(name, attributes_of(num_frames)) as sink:
            for _ in range(num_frames // 16):
                sink.append(queries, maps)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    writer = open_writer(path)
    assert peak("long", 512) < 1.25 * peak("short", 128)


# Commit and resume


def test_only_committed_videos_are_readable(path: Path) -> None:
    writer = open_writer(path)
    write_video(writer, "1", 5)
    queries, maps = random_features(70)
    with pytest.raises(RuntimeError, match="detector"), writer.video("2", attributes_of(70)) as sink:
        sink.append(queries[:66], maps[:66])
        raise RuntimeError("detector failed")
    feature_cache = FeatureCache.open(path)
    assert (feature_cache.video_names(), feature_cache.incomplete()) == (["1"], ["2"])
    with pytest.raises(IncompleteVideo, match=r"'2'.*did not finish[\s\S]*make extract"):
        feature_cache.video("2")
    with pytest.raises(IncompleteVideo, match=r"not in the cache[\s\S]*make extract"):
        feature_cache.video("3")
    assert writer.pending(["3", "2", "1"]) == ["3", "2"]
    write_video(writer, "2", 5)
    assert FeatureCache.open(path).video("2").frame_queries().shape[0] == 5
    with (
        pytest.raises(CacheError, match="complete already"),
        open_writer(path).video("2", attributes_of(5)),
    ):
        pass


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_all_pending(tmp_path / "uninterrupted")
    expected = array_files(tmp_path / "uninterrupted")
    context = multiprocessing.get_context("forkserver")
    deaths, states = 0, []
    for fatal_event in (90, 225, 40, 60, 75, 50):
        child = context.Process(target=write_until_killed, args=(path, fatal_event))
        child.start()
        child.join(60)
        deaths += child.exitcode == -9
        if not (path / "zarr.json").exists():
            continue
        feature_cache = FeatureCache.open(path)
        states.append((feature_cache.video_names(), feature_cache.incomplete()))
        for name in feature_cache.video_names():
            queries, _ = random_features(VIDEOS[name], seed=int(name))
            np.testing.assert_array_equal(feature_cache.video(name).frame_queries(), queries.astype(np.float16))
            assert len(feature_cache.video(name).mask_features()) == VIDEOS[name]
    assert deaths >= 3 and ([], ["1"]) in states
    write_all_pending(path)
    assert array_files(path) == expected
    assert FeatureCache.open(path).incomplete() == []


def test_two_writers_of_one_video_are_refused(path: Path) -> None:
    first, second = open_writer(path), open_writer(path)
    queries, maps = random_features(4)
    with first.video("1", attributes_of(4)) as sink:
        with pytest.raises(CacheError, match="another process"), second.video("1", attributes_of(4)):
            pass
        write_video(second, "2", 4)
        sink.append(queries, maps)
    assert FeatureCache.open(path).video_names() == ["1", "2"]


def test_continuing_keeps_complete_videos_and_records_the_session(path: Path) -> None:
    write_video(open_writer(path), "1", 5)
    before = array_files(path)
    assert open_writer(path).pending(["1"]) == []
    assert len(FeatureCache.open(path).root.sessions) == 1
    write_video(open_writer(path), "2", 5)
    assert before.items() <= array_files(path).items()
    sessions = FeatureCache.open(path).root.sessions
    assert len(sessions) == 2 and sessions[0]["libraries"]["zarr"] == zarr.__version__


# Refusals


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", [0, 1], ids=["queries", "maps"])
def test_non_finite_features_are_refused(path: Path, value: float, field: int) -> None:
    writer = open_writer(path)
    features = random_features(20)
    features[field][13, 0, 0, 0] = value
    with (
        pytest.raises(CacheError, match=r"video '7', frame 13: .*not finite"),
        writer.video("7", attributes_of(20)) as sink,
    ):
        sink.append(features[0][:10], features[1][:10])
        sink.append(features[0][10:], features[1][10:])
    assert FeatureCache.open(path).video_names() == []


@pytest.mark.parametrize("field", [0, 1], ids=["queries", "maps"])
def test_numbers_beyond_float16_are_refused(path: Path, field: int) -> None:
    writer = open_writer(path)
    features = random_features(3)
    features[field][1, 0, 0, 0] = 65504
    features[field][2, 0, 0, 0] = -65520
    with pytest.raises(CacheError, match=r"frame 2: .*range"), writer.video("7", attributes_of(3)) as sink:
        sink.append(*features)


def test_padding_is_not_stored_and_so_not_checked(path: Path) -> None:
    queries, maps = random_features(3)
    maps[:, :, 7:] = np.nan
    with open_writer(path).video("7", attributes_of(3)) as sink:
        sink.append(queries, maps)
    assert FeatureCache.open(path).video_names() == ["7"]


@pytest.mark.parametrize(
    ("queries_shape", "maps_shape", "message"),
    [
        ((9, NUM_LAYERS, 4, 6), (9, 6, *MAP_HW), "too many frames .expected 8, got 9"),
        ((7, NUM_LAYERS, 4, 6), (7, 6, *MAP_HW), "frames are missing .expected 8, got 7"),
        ((8, NUM_LAYERS, 4, 6), (7, 6, *MAP_HW), "need"),
        ((8, NUM_LAYERS, 4), (8, 6, *MAP_HW), "need"),
        ((8, 9, 4, 6), (8, 6, *MAP_HW), "detector layers .expected 3, got 9"),
        ((8, NUM_LAYERS, 4, 6), (8, 6, 7, 11), "padded map"),
    ],
)
def test_wrong_shapes_are_refused(
    path: Path, queries_shape: tuple[int, ...], maps_shape: tuple[int, ...], message: str
) -> None:
    writer = open_writer(path)
    with (
        pytest.raises(CacheError, match=f"video '7': .*{message}"),
        writer.video("7", attributes_of(8)) as sink,
    ):
        sink.append(np.zeros(queries_shape, np.float32), np.zeros(maps_shape, np.float32))
    assert FeatureCache.open(path).incomplete() == ["7"]


@pytest.mark.parametrize("video_id", ["", ".", "..", "../1", "a/b", "a\\b", "a@b", "__a", "a\n", "x" * 300])
def test_unsafe_names_are_refused(path: Path, video_id: str) -> None:
    with pytest.raises(CacheError):
        video_group_name(video_id)
    if "@" not in video_id:
        with pytest.raises(CacheError):
            open_writer(path).pending([video_id])


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(CacheError, match="positive"):
        attributes_of(0)
    with pytest.raises(CacheError, match="padded"):
        VideoAttributes(num_frames=1, image_hw=(24, 40), padded_hw=(32, 32), original_hw=(48, 80))


def test_folders_that_are_no_cache_are_refused(path: Path) -> None:
    with pytest.raises(CacheError, match=r"no feature cache here[\s\S]*make extract"):
        FeatureCache.open(path)
    with pytest.raises(CacheError, match="no feature cache here"):
        FeatureCache.open(".")
    for split in ("train", "valid"):
        open_writer(path / split)
    (path / "other").mkdir()
    (path / "other" / METADATA).write_text("{}")
    with pytest.raises(CacheError, match=rf"did you mean {path}/train or {path}/valid\?"):
        FeatureCache.open(path)
    shutil.rmtree(path)
    path.mkdir()
    (path / "thesis.tex").write_text("")
    with pytest.raises(CacheError, match=r"thesis\.tex"):
        open_writer(path)


def test_videos_without_their_root_are_not_adopted(path: Path) -> None:
    write_video(open_writer(path), "1", 3)
    (path / "zarr.json").unlink()
    with pytest.raises(CacheError, match="no root metadata"):
        open_writer(path)


def test_other_format_versions_are_refused(path: Path) -> None:
    open_writer(path)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["format_version"] = 2
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(FormatVersionError, match=r"expected 1, got 2[\s\S]*make extract"):
        FeatureCache.open(path)
    with pytest.raises(FormatVersionError):
        open_writer(path)


def test_unknown_codecs_are_refused(path: Path) -> None:
    with pytest.raises(CacheError, match=r"unknown codec.*float16.*jpeg"):
        select_codec("jpeg", {}, {})
    with pytest.raises(CacheError, match="codec differs"):
        CacheWriter.open(
            path,
            fingerprint=replace(FINGERPRINT, codec="int8"),
            heads=random_heads(),
            codec=Float16(),
            labels_json=None,
        )


def test_a_cache_without_labels_says_so(path: Path) -> None:
    open_writer(path)
    with pytest.raises(CacheError, match="no labels"):
        FeatureCache.open(path).labels_json()


@pytest.mark.parametrize("content", ["{", "[]", '{"attributes": 3}'])
def test_damaged_metadata_are_refused(path: Path, content: str) -> None:
    write_video(open_writer(path), "1", 3)
    (path / "videos" / "1" / "zarr.json").write_text(content)
    feature_cache = FeatureCache.open(path)
    assert feature_cache.incomplete() == ["1"]
    with pytest.raises(CorruptData):
        feature_cache.video("1")
    (path / "zarr.json").write_text(content)
    with pytest.raises(CorruptData):
        FeatureCache.open(path)


# Inspection


def test_inspect_counts_bytes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = open_writer(path)
    write_video(writer, "1", 70)
    write_video(writer, "2", 10)
    assert main(["inspect", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["videos"], summary["frames"], summary["incomplete"]) == (2, 80, [])
    assert summary["mask_feature_bytes"] >= 80 * 6 * 7 * 11 * 2
    assert summary["bytes_per_frame"] * 80 == pytest.approx(sum(map(len, array_files(path).values())))
    assert main(["inspect", str(path)]) == 0
    assert FINGERPRINT.digest() in capsys.readouterr().out


def test_verify_accepts_a_sound_cache(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(open_writer(path, labels_of({1: 70})), "1", 70)
    assert main(["verify", str(path)]) == 0
    assert "1 videos, 0 defects" in capsys.readouterr().out


def spoil_frame(path: Path) -> None:
    array = zarr.open_array(str(path / "videos/1/mask_features"), mode="r+")
    array[3] = np.full(array.shape[1:], np.inf)


def spoil_bit(path: Path) -> None:
    flip_bit(path / "videos/1/frame_queries/c.0.0.0.0", 5)


def spoil_marker(path: Path) -> None:
    file = path / "videos/1/zarr.json"
    file.write_text(file.read_text().replace('"complete": true', '"complete": false'))


def spoil_attribute(path: Path, name: str, value: object) -> None:
    file = path / "videos/1/zarr.json"
    document = json.loads(file.read_text())
    document["attributes"][name] = value
    file.write_text(json.dumps(document))


def spoil_fingerprint(path: Path) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["fingerprint"]["short_edge"] = 25
    (path / "zarr.json").write_text(json.dumps(document))


def spoil_shape(path: Path, field: str, shape: tuple[int, ...]) -> None:
    """Another array in the prescribed layout, of another detector or codec."""
    shutil.rmtree(path / "videos/1" / field)
    values = np.ones(shape, np.float16)
    writer = ShardWriter(path / "videos/1" / field, shape[0], values, ("T", "a", "b", "c"))
    writer.append(values)
    writer.finish()


def spoil_labels(path: Path, **fields: object) -> None:
    document = json.loads((path / "annotations.json").read_text())
    document["videos"][0] |= fields
    (path / "annotations.json").write_text(json.dumps(document))


def spoil_tracks(path: Path) -> None:
    """An object with masks for four of five frames."""
    document = json.loads((path / "annotations.json").read_text())
    document["categories"] = [{"id": 1, "name": "cat"}]
    document["annotations"] = [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": [None] * 4}]
    (path / "annotations.json").write_text(json.dumps(document))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def exchange_shard(path: Path) -> None:
    """A sound shard of another extraction, as an interrupted copy leaves it."""
    write_video(open_writer(path.parent / "other"), "1", 5, seed=1)
    shutil.copy(path.parent / "other/videos/1/mask_features/c.0.0.0.0", path / "videos/1/mask_features")


@pytest.mark.parametrize(
    ("spoil", "rules"),
    [
        (spoil_frame, ["mask_features"]),
        (spoil_bit, ["frame_queries"]),
        (exchange_shard, ["mask_features"]),
        (lambda path: spoil_attribute(path, "content_crc32c", 7), ["frame_queries", "mask_features"]),
        (spoil_marker, ["complete"]),
        (lambda path: (path / "videos/1/mask_features/c.0.0.0.0").unlink(), ["mask_features"]),
        (lambda path: (path / "detector/class_embed.bias/c.0").unlink(), ["detector"]),
        (lambda path: (path / "annotations.json").write_text("{}"), ["labels"]),
        (lambda path: (path / "annotations.json").write_bytes(labels_of({2: 5})), ["labels", "absent"]),
        (lambda path: (path / "annotations.json").write_bytes(labels_of({1: 6})), ["labels"]),
        (spoil_tracks, ["labels"]),
        (lambda path: spoil_attribute(path, "num_frames", 4), ["labels", "frame_queries", "mask_features"]),
        (lambda path: spoil_attribute(path, "image_hw", [16, 40]), ["mask_features"]),
        (lambda path: spoil_attribute(path, "image_hw", "large"), ["attributes"]),
        (lambda path: truncate(path / "videos/1/mask_features/c.0.0.0.0"), ["mask_features"]),
        (spoil_fingerprint, ["fingerprint"]),
        (lambda path: spoil_attribute(path, "original_hw", [80, 48]), ["labels"]),
        (lambda path: spoil_labels(path, width=81), ["labels"]),
        (lambda path: spoil_attribute(path, "view", {**asdict(View(flip=True))}), ["attributes"]),
        (lambda path: spoil_shape(path, "frame_queries", (5, 3, 4, 7)), ["frame_queries"]),
        (lambda path: spoil_shape(path, "frame_queries", (5, 2, 4, 6)), ["frame_queries"]),
        (lambda path: spoil_shape(path, "mask_features", (5, 7, 7, 11)), ["mask_features"]),
    ],
)
def test_verify_finds_every_defect(
    path: Path, capsys: pytest.CaptureFixture[str], spoil: object, rules: list[str]
) -> None:
    write_video(open_writer(path, labels_of({1: 5})), "1", 5)
    assert callable(spoil)
    spoil(path)
    assert main(["verify", str(path), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["rule"] for finding in findings] == rules


def test_checksums_are_those_of_the_format(path: Path) -> None:
    """Worked out from FORMAT.md's words, over several shards, plain and compressed; absent ones are no defect."""
    write_video(open_writer(path, codec=fitted_codec("logit")), "1", 70)
    video = FeatureCache.open(path).video("1")
    stored = json.loads((path / "videos/1/zarr.json").read_text())["attributes"]["content_crc32c"]
    for field, values in (("frame_queries", video.frame_queries()), ("mask_features", video.mask_features())):
        frames = [crc32c(np.frombuffer(frame.tobytes(), np.uint8)) for frame in values]
        assert stored[field] == crc32c(np.array(frames, "<u4").view(np.uint8))
    spoil_attribute(path, "content_crc32c", None)
    assert main(["verify", str(path)]) == 0


def test_a_codec_for_other_channels_than_the_heads_is_found(path: Path) -> None:
    codec = Int8(step_C=np.ones(5, np.float32), offset_C=np.zeros(5, np.float32))
    open_writer(path, codec=codec)
    (finding,) = verify_root(FeatureCache.open(path))
    assert finding.rule == "codec" and "not for 6 channels" in finding.message


def test_labelled_videos_that_are_absent_are_worth_a_warning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(open_writer(path, labels_of({1: 5, 2: 3})), "1", 5)
    assert main(["verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert "warning: absent: 1 of 2 labelled videos are not in the cache: 2\n" in said and "0 defects" in said


def test_the_command_line_reports_bad_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no feature cache here" in said and "Traceback" not in said
    assert main(["verify", str(tmp_path), "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err
