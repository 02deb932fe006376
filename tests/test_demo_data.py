from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import ConfigError
from cache.labels import masks
from cache.labels.annotations import load_labels
from extract.demo.motion import crossing, drift, excursion
from extract.demo.shapes import DETECTOR_CATEGORIES, VIDEO_CATEGORIES, Sprite, silhouette
from extract.demo.stills import make_still
from extract.demo.videos import FRAME_SIZES, make_actors, write_demo_data, write_split, write_video


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first = write_video("train", 3, tmp_path / "a", num_frames=4)
    second = write_video("train", 3, tmp_path / "b", num_frames=4)
    assert first == second
    for name in first["video"]["file_names"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert write_video("valid", 3, tmp_path / "c", num_frames=4) != first


def test_labels_are_valid_and_fit_the_frames(tiny_data: Path) -> None:
    labels = load_labels(tiny_data / "train.json")
    assert [c.name for c in labels.categories] == list(VIDEO_CATEGORIES)
    assert {(v.height, v.width) for v in labels.videos} == set(FRAME_SIZES)
    for video in labels.videos:
        with Image.open(tiny_data / "train" / "JPEGImages" / video.file_names[0]) as image:
            assert (image.height, image.width) == (video.height, video.width)
    for video in labels.videos:  # visible masks never overlap
        for frame in range(video.length):
            present = [t.segmentations[frame] for t in labels.tracks_of(video.id)]
            covered = sum(masks.mask(rle).astype(int) for rle in present if rle is not None)
            assert np.max(covered) <= 1


def test_the_json_comes_last(tmp_path: Path) -> None:
    write_split(tmp_path, "valid", 1, num_frames=2)
    assert json.loads((tmp_path / "valid.json").read_text())["videos"][0]["length"] == 2
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "foreign",
    [
        "train/JPEGImages/0a1b/00000.jpg",
        "valid/clip/00000.jpg",
        "stills/00001.jpg",
        "frames/0a1b/00000.jpg",
        "labels.json",
        "train.json",
    ],
)
def test_what_the_generator_did_not_write_stays(tmp_path: Path, foreign: str) -> None:
    """`make extract data.root=/my/data` with CONFIG forgotten generates the demo's data there first."""
    mine = tmp_path / foreign
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"CONFIG="):
        write_demo_data(tmp_path, num_train=1, num_valid=1, num_stills=1)
    assert mine.read_bytes() == b"mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.json").touch()
    (tmp_path / "stills.json").touch()
    write_demo_data(tmp_path, num_train=1, num_valid=1, num_stills=1)  # All is there: nothing to do, nothing to say.


def test_the_demos_own_data_is_added_to(tmp_path: Path) -> None:
    write_demo_data(tmp_path, num_train=1, num_valid=0)
    (tmp_path / ".DS_Store").touch()
    write_demo_data(tmp_path, num_train=1, num_valid=1, num_stills=1)
    assert {path.name for path in tmp_path.glob("*.json")} == {"train.json", "valid.json", "stills.json"}
    (tmp_path / "valid.json").unlink()  # The generator no longer knows whether all of it is there.
    with pytest.raises(ConfigError, match="there already, without its labels"):
        write_demo_data(tmp_path, num_train=1, num_valid=1)


def test_a_killed_generation_starts_anew(tmp_path: Path) -> None:
    left = tmp_path / "valid" / "JPEGImages.generated" / "shapes_valid_0009"
    left.mkdir(parents=True)
    write_split(tmp_path, "valid", 1, num_frames=2)
    assert [path.name for path in (tmp_path / "valid").glob("*/*")] == ["shapes_valid_0001"]


def test_the_world_has_the_promised_difficulties() -> None:
    new_to_detector = set(VIDEO_CATEGORIES) - set(DETECTOR_CATEGORIES)
    assert 0 < len(new_to_detector) < len(VIDEO_CATEGORIES)
    background = np.zeros((*FRAME_SIZES[0], 3))
    lookalikes = unlabelled = left_and_back = 0
    for seed in range(80):
        actors = make_actors(np.random.default_rng(seed), background, 20)
        labelled = [actor for actor in actors if actor.labelled]
        assert 1 <= len(labelled) <= 4
        assert all(actor.radii.max() < 10 for actor in actors if not actor.labelled)
        unlabelled += len(actors) > len(labelled)
        lookalikes += len({id(actor.sprite.texture) for actor in labelled}) < len(labelled)
        for actor in labelled:
            inside = [bool(silhouette(actor.at(t), FRAME_SIZES[0]).sum() >= 8) for t in range(20)]
            flips = sum(a != b for a, b in pairwise(inside))
            left_and_back += inside[0] and inside[-1] and flips >= 2
    assert min(lookalikes, unlabelled, left_and_back) >= 8


def test_paths() -> None:
    rng = np.random.default_rng(0)
    wander = drift(rng, (90, 160), 200)
    assert wander.min() >= 0 and wander[:, 0].max() <= 160 and wander[:, 1].max() <= 90
    one, two = crossing(rng, (90, 160), 31)
    assert np.linalg.norm(one - two, axis=1).min() < 3
    away = excursion(rng, (90, 160), 30, 20.0, (8, 20))
    assert all(x < -20 or x > 180 for x in away[8:21:12, 0])


def test_a_square_has_its_area() -> None:
    texture = np.zeros((8, 8, 3))
    square = Sprite(category="square", center_xy=(40, 40), radius=20, angle=0.3, stretch=1.0, texture=texture)
    side = 20 * 1.15 * np.sqrt(2)
    assert silhouette(square, (80, 80)).sum() == pytest.approx(side**2, rel=0.05)  # the border pixels


def test_stills_are_seeded_and_of_the_detectors_world() -> None:
    first, again, other = make_still(5, (90, 160)), make_still(5, (90, 160)), make_still(6, (90, 160))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)
    classes = np.concatenate([make_still(seed, (60, 60)).classes for seed in range(60)])
    assert set(classes.tolist()) == set(range(len(DETECTOR_CATEGORIES)))
