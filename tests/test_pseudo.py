"""Pseudo-videos: images play videos, their labels follow every transform, and training mixes them in."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from cache.errors import AnnotationError, ConfigError, FingerprintMismatch, FrameError
from cache.labels import masks
from cache.labels.stills import load_stills
from cache.labels.tracks import Category
from cache.media.geometry import Transform
from cache.reader import FeatureCache
from cache.upkeep.verification import verify_root, verify_video
from configs.schema import PseudoSettings, Settings
from extract.demo.stills import write_stills
from extract.pseudo import draw_pseudo_videos
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.test_geometry import naive
from train_head.checkpoint import load_checkpoint
from train_head.data.clips import ClipConfig, ClipStream
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.run_folder import METRICS_LOG
from train_head.trainer import train

POLYGONS = [[2.0, 1.0, 12.0, 1.0, 12.0, 9.0], [14.0, 2.0, 18.0, 2.0, 18.0, 8.0, 14.0, 8.0]]
RUNS = {"size": [20, 30], "counts": [45, 5, 15, 5, 530]}


def coco(tmp_path: Path, *segmentations: object, **changes: Any) -> Path:
    annotations = [
        {"id": n, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": given}
        for n, given in enumerate(segmentations, start=1)
    ]
    image = {"id": 7, "file_name": "a.png", "height": 20, "width": 30}
    names = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    content = {"images": [image], "annotations": annotations, "categories": names, "info": {}} | changes
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path / "coco.json"


def test_polygons_and_run_lengths_become_masks(tmp_path: Path) -> None:
    text = masks.from_counts([RUNS["counts"]], 20, 30)[0].counts
    (still,) = load_stills(coco(tmp_path, POLYGONS, RUNS, {**RUNS, "counts": text})).stills
    first, second, third = (masks.mask(found.mask(20, 30)) for found in still.objects)
    expected = np.zeros((20, 30), np.uint8)
    expected[5:10, 2] = expected[5:10, 3] = 1  # runs go down the columns: 45 = 2 * 20 + 5
    assert np.array_equal(second, expected) and np.array_equal(third, expected)
    whole = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(POLYGONS, 20, 30)))
    assert np.array_equal(first, whole) and first[4, 15] == 1 and first[2, 11] == 1 and first[8, 3] == 0


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "less than three points"),
        ([], "not a segmentation"),
        ("polygon", "not a segmentation"),
        ([["a", 1, 2, 3, 4, 5]], "a coordinate of 'a'"),
        ([[1e8, 1, 2, 3, 4, 5]], r"a coordinate of 100000000\.0"),  # would keep pycocotools busy for hours
        ([[float("nan"), 1, 2, 3, 4, 5]], "a coordinate of nan"),
        ([[10**400, 1, 2, 3, 4, 5]], "a coordinate of 1000"),
        ({"size": [30, 20], "counts": [600]}, "size is not the image's"),
        ({"size": [20, 30], "counts": [1, 2]}, "add up to 3"),
        ({"counts": [600]}, "not a segmentation"),
    ],
)
def test_broken_segmentations_name_their_entry(tmp_path: Path, segmentation: object, message: str) -> None:
    (still,) = load_stills(coco(tmp_path, segmentation)).stills
    with pytest.raises(AnnotationError, match=rf"coco.json: annotations\[0\] \(id 1\)[\s\S]*{message}"):
        still.objects[0].mask(20, 30)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"images": 3}, "'images' is wrong"),
        ({"images": [{"id": 7, "file_name": "../a.png", "height": 2, "width": 3}]}, "out of the image folder"),
        ({"annotations": [{"id": 1, "image_id": 8, "category_id": 18, "segmentation": []}]}, "unknown image"),
    ):
        with pytest.raises(AnnotationError, match=message):
            load_stills(coco(tmp_path, POLYGONS, **changes))


def ytvis_like() -> list[Category]:
    return [Category(id=1, name="dog"), Category(id=2, name="cat")]


def test_categories_are_translated_and_crowds_left_out(tmp_path: Path) -> None:
    crowd = {"id": 9, "image_id": 7, "category_id": 18, "iscrowd": 1, "segmentation": RUNS}
    unknown = {"id": 8, "image_id": 7, "category_id": 90, "iscrowd": 0, "segmentation": POLYGONS}
    known = {"id": 7, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": POLYGONS}
    (pseudo,) = draw_pseudo_videos(PseudoSettings(), coco(tmp_path, annotations=[crowd, unknown, known]), ytvis_like())
    assert pseudo.categories == {18: 1} and len(pseudo.still.objects) == 2
    with pytest.raises(AnnotationError, match="no image shows a category of the train labels"):
        draw_pseudo_videos(PseudoSettings(), coco(tmp_path, annotations=[crowd, unknown]), ytvis_like())


@pytest.fixture(scope="module")
def mixed(tiny_data: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The tiny cache, with pseudo-videos of 3 of 6 images."""
    root = tmp_path_factory.mktemp("pseudo")
    shutil.copytree(tiny_data, root / "data")
    shutil.copytree(tiny_cache, root / "cache")
    write_stills(root / "data", 6)
    words = ["pseudo.ratio=0.75", "pseudo.num_images=3", "pseudo.num_frames=4", "name=mixed"]
    settings = tiny_settings(root / "data", root / "cache", root / "runs", *words)
    extract(settings)
    return settings


def test_labels_of_pseudo_videos_are_those_of_their_frames(mixed: Settings) -> None:
    """Every frame's transform is read from its name; masks are turned by a loop over pixels."""
    feature_cache = FeatureCache.open(Path(mixed.cache.path) / "pseudo")
    labels, stills = feature_cache.labels(), load_stills(Path(mixed.data.root) / "stills.json")
    assert len(labels.videos) == 3 and not list(verify_root(feature_cache))
    by_id, names = {still.id: still for still in stills.stills}, {c.id: c.name for c in stills.categories}
    assert [c.name for c in labels.categories] == [c.name for c in open_training_set(mixed).labels.categories]
    shown = 0
    for video in labels.videos:
        assert not list(verify_video(feature_cache, str(video.id)))
        still = by_id[video.id]
        transforms = [parse(name.partition("@")[2]) for name in video.file_names]
        assert len(set(transforms)) == 4 and {t.size for t in transforms} == {(video.height, video.width)}
        assert feature_cache.video(str(video.id)).attributes.image_hw == (video.height, video.width)
        known = [found for found in still.objects if names[found.category_id] not in ("heart", "ell")]
        expected = []
        for found in known:
            whole = masks.mask(found.mask(still.height, still.width))
            frames = [naive(whole, transform) for transform in transforms]
            if any(frame.any() for frame in frames):
                expected.append((names[found.category_id], frames))
        tracks = labels.tracks_of(video.id)
        assert len(tracks) == len(expected)
        for track, (name, frames) in zip(tracks, expected, strict=True):
            assert labels.categories[labels.category_index[track.category_id]].name == name
            for rle, frame, area in zip(track.segmentations, frames, track.areas, strict=True):
                assert (rle is None and not frame.any()) or (rle is not None and np.array_equal(masks.mask(rle), frame))
                assert area == frame.sum()
                shown += bool(frame.any())
    assert shown > 8


def parse(name: str) -> Transform:
    parts = name.split("-", 2) if name.count("-") > 1 else name.split("-")
    crop = tuple(map(int, parts[0].removeprefix("crop").split("x")))
    size = tuple(map(int, parts[1].removeprefix("size").split("x")))
    rest = parts[2] if len(parts) > 2 else ""
    angle = rest.partition("rotate")[2]
    return Transform(
        crop=(crop[0], crop[1], crop[2], crop[3]),
        size=(size[0], size[1]),
        flip=rest.startswith("flip"),
        rotation=float(angle) if angle else 0.0,
    )


def test_pseudo_frames_are_the_transformed_image(mixed: Settings, tmp_path: Path) -> None:
    """Features of one, against those of the same pixels written to disk as a data set of their own."""
    held = FeatureCache.open(Path(mixed.cache.path) / "pseudo")
    video = held.labels().videos[0]
    for index, name in enumerate(video.file_names):
        file, _, transform = name.partition("@")
        with Image.open(Path(mixed.data.root) / "stills" / file) as image:
            target = tmp_path / "train/JPEGImages" / f"{index}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            parse(transform).on_image(image).save(target)
    entry = {"id": 1, "height": video.height, "width": video.width, "length": 4}
    document = {"videos": [entry | {"file_names": [f"{i}.png" for i in range(4)]}], "annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(document | {"categories": [{"id": 1, "name": "a"}]}))
    extract(tiny_settings(tmp_path, tmp_path / "features", tmp_path), only=["train"])
    expected = FeatureCache.open(tmp_path / "features/train").video("1")
    got = held.video(str(video.id))
    np.testing.assert_allclose(got.mask_features(), expected.mask_features(), atol=2e-3)
    np.testing.assert_allclose(got.frame_queries(), expected.frame_queries(), atol=2e-2)


def test_more_images_only_extend_and_other_crops_are_refused(mixed: Settings, tmp_path: Path) -> None:
    root = Path(mixed.data.root)
    features = tmp_path / "cache"
    shutil.copytree(mixed.cache.path, features)
    words = ["pseudo.ratio=0.75", "pseudo.num_frames=4"]
    before = FeatureCache.open(features / "pseudo").video_names()
    extract(tiny_settings(root, features, tmp_path, *words), only=["pseudo"])
    after = FeatureCache.open(features / "pseudo")
    assert set(before) < set(after.video_names()) and len(after.video_names()) >= 5
    with pytest.raises(FingerprintMismatch, match="lists other frames"):
        extract(tiny_settings(root, features, tmp_path, *words, "pseudo.rotation=3"), only=["pseudo"])
    (root / "stills" / "00001.jpg").rename(root / "stills" / "moved.jpg")
    try:
        with pytest.raises(FrameError, match=r"00001.jpg"):
            extract(tiny_settings(root, features, tmp_path, *words), only=["pseudo"])
    finally:
        (root / "stills" / "moved.jpg").rename(root / "stills" / "00001.jpg")


# Mixing


def test_each_epoch_has_every_video_once_and_its_share_of_the_others(mixed: Settings) -> None:
    sources = open_training_set(mixed).sources
    assert [source.ratio for source in sources] == [1.0, 0.75]
    config = ClipConfig(num_frames=3, frame_range=4, seed=5)
    stream = ClipStream([source.labels for source in sources], [1.0, 0.75], config)
    size = 5 + 4  # round(5 * 0.75)
    epochs = [[stream.video_at(index) for index in range(size * e, size * (e + 1))] for e in range(6)]
    for epoch in epochs:
        counts = Counter(source for source, _ in epoch)
        assert counts == {0: 5, 1: 4}
        assert len({video_id for source, video_id in epoch if source == 0}) == 5
    others = Counter(video_id for epoch in epochs for source, video_id in epoch if source == 1)
    assert set(others.values()) == {8}  # 6 epochs of 4 clips over 3 pseudo-videos
    assert epochs[0] != epochs[1]
    again = ClipStream([source.labels for source in sources], [1.0, 0.75], config)
    assert [again.draw(index) for index in (40, 3, 17)] == [stream.draw(index) for index in (40, 3, 17)]


def test_a_mixed_run_resumes_bit_for_bit(mixed: Settings) -> None:
    whole = replace(mixed, name="whole")
    first = replace(mixed, name="parts", train=replace(mixed.train, time_budget=1e-3))
    train(whole)
    train(first)
    assert load_checkpoint(Path(mixed.runs) / "parts" / "checkpoint.pt").step < 6
    train(replace(mixed, name="parts"))
    expected, got = (load_checkpoint(Path(mixed.runs) / name / "checkpoint.pt").head for name in ("whole", "parts"))
    assert all(np.array_equal(expected[key].numpy(), got[key].numpy()) for key in expected)


def test_other_caches_mix_if_detector_and_categories_are_the_same(mixed: Settings, tmp_path: Path) -> None:
    features, root = Path(mixed.cache.path), Path(mixed.data.root)

    def opened(cache: Path) -> Settings:
        return tiny_settings(root, features, tmp_path, f"train.mix=[{{cache: {cache}, ratio: 0.4}}]")

    sources = open_training_set(opened(features / "valid")).sources
    assert [source.ratio for source in sources] == [1.0, 0.4]
    other = tmp_path / "other"
    shutil.copytree(features / "valid", other)
    metadata = json.loads((other / "zarr.json").read_text())
    metadata["attributes"]["fingerprint"]["weights_sha256"] = "ab" * 32
    (other / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(FingerprintMismatch, match=r"detector weights: ababababab[\s\S]*same detector"):
        open_training_set(opened(other))
    shutil.rmtree(other)
    shutil.copytree(features / "valid", other)
    labels = json.loads((other / "annotations.json").read_text())
    labels["categories"][0]["name"] = "disc"
    (other / "annotations.json").write_text(json.dumps(labels))
    with pytest.raises(AnnotationError, match=r"other categories: only in the train cache \[\(1, 'circle'\)\]"):
        open_training_set(opened(other))


def test_a_mixed_cache_without_a_clip_to_show_is_named(mixed: Settings, tmp_path: Path) -> None:
    features, other = Path(mixed.cache.path), tmp_path / "other"
    shutil.copytree(features / "valid", other)

    def mixing(ratio: float) -> Settings:
        words = (f"train.mix=[{{cache: {other}, ratio: {ratio}}}]", "train.iterations=1", "name=none")
        return tiny_settings(Path(mixed.data.root), features, tmp_path, *words)

    with pytest.raises(
        ConfigError, match=r"other: a ratio of 0\.1 is less than one clip for the 5 (.|\n)*to 0\.2 or more"
    ):
        train(mixing(0.1))
    assert CachedSource(mixing(0.2), open_training_set(mixing(0.2)), torch.device("cpu")).clips().stream._shares == [
        5,
        1,
    ]
    path = other / "annotations.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(AnnotationError, match="other: no video with a labelled object"):
        train(mixing(1.0))
    assert not (tmp_path / "none" / METRICS_LOG).exists()  # so that a run of this name may have other settings
