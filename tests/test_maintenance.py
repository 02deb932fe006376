"""`prune`, `diff` and the oldest format on the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.__main__ import main
from cache.codecs.float16 import Float16
from cache.codecs.rate_distortion import read_calibration
from cache.errors import CorruptData, FormatVersionError
from cache.fingerprint import Provenance
from cache.heads import DetectorHeads
from cache.reader import FeatureCache
from cache.upkeep.maintenance import differences, prunable, prune
from cache.upkeep.staging import stage
from cache.writer import CacheWriter
from tests.cache_samples import (
    FINGERPRINT,
    attributes_of,
    flip_bit,
    labels_of,
    open_writer,
    random_features,
    random_heads,
    write_video,
)
from tests.train_until import interrupt

FORMAT_1 = Path(__file__).parent / "golden" / "format1"


def begun_and_left(path: Path, name: str) -> None:
    with pytest.raises(RuntimeError), open_writer(path).video(name, attributes_of(5)):
        raise RuntimeError


# prune


def test_prune_shows_first_and_deletes_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    writer = open_writer(path, labels_of({1: 5}))
    for name in ("1", "2"):
        write_video(writer, name, 5)
    begun_and_left(path, "3")
    assert main(["prune", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "videos/2: not in annotations.json" in shown and "videos/3" in shown and "videos/1" not in shown
    assert "2 videos" in shown and "nothing done yet" in shown
    assert {entry.name for entry in (path / "videos").iterdir() if entry.is_dir()} == {"1", "2", "3"}
    assert main(["prune", str(path), "--delete"]) == 0
    assert {entry.name for entry in (path / "videos").iterdir() if entry.is_dir()} == {"1"}
    assert FeatureCache.open(path).video("1").frame_queries().shape[0] == 5


def test_prune_without_labels_orphans_nothing(tmp_path: Path) -> None:
    write_video(open_writer(tmp_path / "a"), "2", 5)
    assert main(["prune", str(tmp_path / "a"), "--delete"]) == 0
    assert FeatureCache.open(tmp_path / "a").video_names() == ["2"]


def test_prune_leaves_a_video_alone_that_is_being_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    begun_and_left(path, "2")
    with open_writer(path).video("1", attributes_of(5)) as sink:
        assert main(["prune", str(path), "--delete"]) == 1
        said = capsys.readouterr().out
        assert "another process is writing" in said and "2 videos" in said and "deleted, but for 1" in said
        sink.append(*random_features(5))
    assert FeatureCache.open(path).video_names() == ["1"] and not (path / "videos/2").exists()


def test_a_damaged_marker_alone_does_not_delete_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    write_video(open_writer(path), "1", 5)
    flip_bit(path / "videos/1/zarr.json", 0)
    assert main(["prune", str(path), "--delete"]) == 0
    said = capsys.readouterr().out
    assert "zarr.json is damaged" in said and "kept, unless --unreadable" in said and "0 videos" in said
    assert (path / "videos/1/mask_features").exists()
    assert main(["prune", str(path), "--delete", "--unreadable"]) == 0
    assert not (path / "videos/1").exists()


def test_a_video_that_was_finished_meanwhile_is_not_pruned(tmp_path: Path) -> None:
    begun_and_left(tmp_path / "a", "1")
    found = prunable(FeatureCache.open(tmp_path / "a"))
    write_video(open_writer(tmp_path / "a"), "1", 5)
    prune(found)
    assert FeatureCache.open(tmp_path / "a").video_names() == ["1"]


def test_only_folders_are_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(open_writer(tmp_path / "a"), "2", 5)
    main(["export", str(tmp_path / "a"), str(tmp_path / "a.h5")])
    assert main(["prune", str(tmp_path / "a.h5")]) == 2
    assert "folder" in capsys.readouterr().err


# diff


def test_diff_says_in_words_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(open_writer(tmp_path / "a", labels_of({1: 5, 2: 5})), "1", 5)
    other = open_writer(tmp_path / "b", labels_of({1: 5, 2: 5}, "x"), replace(FINGERPRINT, short_edge=480))
    write_video(other, "1", 5)
    write_video(other, "2", 5)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    shown = capsys.readouterr().out
    assert "features: short edge of the network input (pixels): 24 here, 480 there" in shown
    assert "videos: 1 only there: 2" in shown
    assert "videos: 1 show other frames, such as 1" in shown
    assert "labels: the label files differ" in shown
    assert "not interchangeable" in shown


def test_diff_compares_heads_and_category_names(tmp_path: Path) -> None:
    heads = random_heads()
    write_video(open_writer(tmp_path / "a"), "1", 5)
    arrays = {name: array + (name == "class_embed.bias") for name, array in heads.arrays.items()}
    CacheWriter.open(
        tmp_path / "b",
        fingerprint=FINGERPRINT,
        heads=DetectorHeads(arrays=arrays, category_names=("circle", "square")),
        codec=Float16(),
        labels_json=None,
    )
    found = list(differences(FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b")))
    assert "heads: the category names differ" in found and "heads: other numbers in class_embed.bias" in found
    (tmp_path / "b/detector/class_embed.bias/c.0").unlink()
    found = list(differences(FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b")))
    assert any(line.startswith("heads: cannot be read there: ") for line in found)


def test_diff_goes_on_after_a_video_that_cannot_be_read(tmp_path: Path) -> None:
    write_video(open_writer(tmp_path / "a"), "1", 5)
    write_video(open_writer(tmp_path / "a"), "2", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    marker = tmp_path / "b/videos/1/zarr.json"
    marker.write_text(marker.read_text().replace('"num_frames": 5', '"num_frames": "five"'))
    marker = tmp_path / "b/videos/2/zarr.json"
    marker.write_text(marker.read_text().replace('"num_frames": 5', '"num_frames": 6'))
    found = list(differences(FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b")))
    assert found == ["videos: 1 cannot be read there: 1", "videos: 1 show other frames, such as 2"]


def test_diff_tells_where_two_caches_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, host, torch in (("a", "earth", "2.11"), ("b", "moon", "2.12")):
        writer = CacheWriter.open(
            tmp_path / name,
            fingerprint=FINGERPRINT,
            heads=random_heads(),
            codec=Float16(),
            labels_json=None,
            provenance=Provenance(date="d", host=host, command="c", libraries={"torch": torch}, paths={}),
        )
        write_video(writer, "1", 5)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0  # Where from does not matter.
    assert capsys.readouterr().out.splitlines() == [
        "origin: host: earth here, moon there",
        "origin: libraries: torch: 2.11 here, 2.12 there",
        "the features are interchangeable",
    ]


def test_diff_of_a_copy_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(open_writer(tmp_path / "a"), "1", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == "the features are interchangeable\n"


# Format 1 for ever


def test_every_version_reads_format_1() -> None:
    feature_cache = FeatureCache.open(FORMAT_1)
    video = feature_cache.video("7")
    queries, maps = random_features(3, seed=5)
    np.testing.assert_array_equal(video.frame_queries(), queries.astype(np.float16))
    np.testing.assert_array_equal(video.mask_features([2, 0]), maps.astype(np.float16)[[2, 0], :, :7, :11])
    assert feature_cache.fingerprint == FINGERPRINT and feature_cache.codec == Float16()
    np.testing.assert_array_equal(
        feature_cache.heads.arrays["class_embed.bias"], random_heads().arrays["class_embed.bias"]
    )
    assert main(["verify", str(FORMAT_1)]) == 0


@pytest.mark.parametrize("name", ["int8", "logit", "spectral"])
def test_every_version_reads_the_fitted_codecs_of_format_1(name: str) -> None:
    path = FORMAT_1.with_name(f"format1_{name}")
    feature_cache, expected = FeatureCache.open(path), np.load(path.with_suffix(".npz"))
    assert feature_cache.video_names() == ["7", "8", "8@flip"] and feature_cache.video("8@flip").attributes.view.flip
    assert [video.length for video in feature_cache.labels().videos] == [66, 3]
    calibration, codec = read_calibration(path), feature_cache.codec
    assert calibration is not None and calibration.rows[0].codec == codec.name == name
    embeddings_NR, constant_N = codec.fold(expected["embeddings"])
    assert constant_N is not None
    for video in ("7", "8@flip"):
        frames, key = expected[f"frames_{video.replace('@', '_')}"].tolist(), video.replace("@", "_")
        clip = feature_cache.video(video).read_clip(frames)
        np.testing.assert_array_equal(clip.frame_queries, expected[f"queries_{key}"])
        maps, map_hw = clip.mask_features, feature_cache.video(video).attributes.map_hw
        np.testing.assert_allclose(codec.decode(maps, map_hw), expected[f"features_{key}"], rtol=1e-5, atol=1e-4)
        maps = maps if codec.planes is None else codec.planes.expand(maps, map_hw)
        logits = np.einsum("nr,trhw->tnhw", embeddings_NR, maps) + constant_N[:, None, None]
        np.testing.assert_allclose(logits, expected[f"logits_{key}"], rtol=1e-5, atol=1e-3)
    assert main(["verify", str(path)]) == 0


def test_format_1_is_upgraded_by_doing_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(FORMAT_1, tmp_path / "a")
    assert main(["upgrade", str(path)]) == 0
    assert "is format 1 already: nothing to do" in capsys.readouterr().out
    assert main(["upgrade", str(tmp_path / "none")]) == 2
    for file in FORMAT_1.rglob("*"):
        assert file.is_dir() or (path / file.relative_to(FORMAT_1)).read_bytes() == file.read_bytes()


def test_a_later_version_names_the_command_that_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(FORMAT_1, tmp_path / "a")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["format_version"] = 2
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(
        FormatVersionError, match=r"git pull[\s\S]*python -m cache upgrade /[^<]*/a`[\s\S]*make extract"
    ):
        FeatureCache.open(path)
    before = (path / "zarr.json").read_bytes()
    assert main(["upgrade", str(path)]) == 2
    assert "update vita-cache" in capsys.readouterr().err
    assert (path / "zarr.json").read_bytes() == before
    root["attributes"]["format_version"] = 0
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(FormatVersionError, match=r"expected 1, got 0[\s\S]*make extract CONFIG"):
        FeatureCache.open(path)
    assert main(["upgrade", str(path)]) == 2


# What other programs, interruptions and damage leave


def test_an_interrupted_deletion_leaves_no_video_that_counts_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_video(open_writer(path, labels_of({1: 5})), "2", 5)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: interrupt())
    with pytest.raises(KeyboardInterrupt):
        prune(prunable(FeatureCache.open(path)))
    assert FeatureCache.open(path).video_names() == []
    assert (path / "videos/2/mask_features").exists()


def test_linked_videos_are_staged_and_pruned(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_video(open_writer(path, labels_of({1: 5})), "1", 5)
    write_video(open_writer(path), "2", 5)
    for name in ("1", "2"):
        (path / "videos" / name).rename(tmp_path / name)
        (path / "videos" / name).symlink_to(tmp_path / name)
    stage(path, tmp_path / "ssd")
    assert FeatureCache.open(tmp_path / "ssd").video("1").frame_queries().shape[0] == 5
    prune(prunable(FeatureCache.open(path)))
    assert FeatureCache.open(path).video_names() == ["1"] and (tmp_path / "2").exists()


def test_diff_names_videos_of_other_numbers(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_video(open_writer(tmp_path / name), "1", 5, seed=seed)
    lines = list(differences(*(FeatureCache.open(tmp_path / name) for name in ("a", "b"))))
    assert "videos: 1 hold other numbers, such as 1" in [line.replace("'", "") for line in lines]


def test_folders_of_other_tools_are_no_videos(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_video(open_writer(path), "1", 5)
    (path / "videos/.ipynb_checkpoints").mkdir()
    shutil.copytree(path / "videos/1", path / "videos/.1.bak")
    assert main(["verify", str(path)]) == 0 and main(["inspect", str(path)]) == 0
    assert prunable(FeatureCache.open(path)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fingerprint", {"pixel_mean": "x"}),
        ("codec", {"name": [], "parameters": {}}),
        ("codec", {"name": "float16", "parameters": None}),
        ("provenance", "x"),
    ],
)
def test_root_attributes_of_other_types_are_corrupt_data(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "a"
    write_video(open_writer(path), "1", 5)
    document = json.loads((path / "zarr.json").read_bytes())
    old = document["attributes"][key]
    document["attributes"][key] = {**old, **value} if isinstance(value, dict) and key == "fingerprint" else value
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(CorruptData, match="unreadable"):
        FeatureCache.open(path)
