"""Views: extracted beside the videos, only where they are missing, found by training, with labels that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.__main__ import main as cache_main
from cache.errors import ConfigError, IncompleteVideo
from cache.labels import masks
from cache.labels.tracks import Video
from cache.layout import View
from cache.reader import FeatureCache
from cache.upkeep.inspection import summarise
from cache.upkeep.maintenance import prunable
from cache.upkeep.verification import verify_root, verify_video
from configs.schema import Settings, ViewSettings
from configs.views import train_views
from extract.stage import extract
from tests.cache_samples import files_below
from tests.conftest import tiny_settings
from train_head.data.clips import ClipDataset
from train_head.data.sources import clip_stream
from train_head.data.video_sets import open_training_set
from train_head.trainer import train

VIEWS = "data.views=[{flip: true}, {crop: 0.7, short_edge: 80, flip: true}]"


@pytest.fixture(scope="module")
def views(tiny_data: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The tiny cache, with two views more."""
    features = tmp_path_factory.mktemp("views") / "cache"
    shutil.copytree(tiny_cache, features)
    settings = tiny_settings(tiny_data, features, features / "runs", VIEWS, "name=views", "train.iterations=3")
    extract(settings)
    return settings


def test_added_views_are_the_only_ones_extracted(views: Settings, tiny_cache: Path) -> None:
    features = Path(views.cache.path)
    names = FeatureCache.open(features / "train").video_names()
    assert len(names) == 15 and sum(name.endswith("@flip") for name in names) == 5
    assert FeatureCache.open(features / "valid").video_names() == ["1", "2"]
    for split in ("train", "valid"):
        for name in FeatureCache.open(tiny_cache / split).video_names():
            before, after = (files_below(root / split / "videos" / name) for root in (tiny_cache, features))
            assert before == after
    record = json.loads((features / "train" / "extraction.json").read_text())
    assert record["frames"] == 3 * 30
    extract(views)
    assert json.loads((features / "train" / "extraction.json").read_text())["frames"] == record["frames"]


def test_a_view_holds_the_features_of_the_transformed_frames(views: Settings, tiny_data: Path, tmp_path: Path) -> None:
    """The same frames, cut out and mirrored by slices and resized by Pillow, as a data set of their own."""
    document = json.loads((tiny_data / "train.json").read_text())
    feature_cache = FeatureCache.open(Path(views.cache.path) / "train")
    (_, _, view) = train_views(views, feature_cache.labels().video_by_id[2])
    assert view.crop is not None
    top, left, height, width = view.crop
    assert (height, width) == (round(0.7 * 90), round(0.7 * 160))
    video = next(video for video in document["videos"] if video["id"] == 2)
    for name in video["file_names"]:
        pixels = np.asarray(Image.open(tiny_data / "train/JPEGImages" / name))
        image = Image.fromarray(pixels[top : top + height, left : left + width])
        image = image.resize((142, 80), Image.Resampling.BILINEAR)  # 80 / 63 * 112 = 142.2
        target = tmp_path / "train/JPEGImages" / Path(name).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)[:, ::-1]).save(target)
    names = [str(Path(name).with_suffix(".png")) for name in video["file_names"]]
    document |= {"videos": [{**video, "height": 80, "width": 142, "file_names": names}], "annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(document))
    extract(tiny_settings(tmp_path, tmp_path / "features", tmp_path), only=["train"])
    expected = FeatureCache.open(tmp_path / "features/train").video("2")
    held = feature_cache.video(f"2@{view.name}")
    assert held.attributes.image_hw == (80, 142) and held.attributes.original_hw == (height, width)
    np.testing.assert_allclose(held.mask_features(), expected.mask_features(), atol=2e-3)
    np.testing.assert_allclose(held.frame_queries(), expected.frame_queries(), atol=2e-2)


def dataset_of(settings: Settings) -> ClipDataset:
    sources = open_training_set(settings).sources
    labels, ratios = [source.labels for source in sources], [source.ratio for source in sources]
    return ClipDataset(
        sources, clip_stream(settings, labels, ratios, [source.feature_cache.path for source in sources])
    )


def test_clips_show_every_view_with_labels_that_follow(views: Settings) -> None:
    dataset = dataset_of(views)
    (source,) = dataset.sources
    seen = set()
    for index in range(30):
        clip, again = (dataset.read(index, np.empty) for _ in range(2))
        assert (again.key, again.frames) == (clip.key, clip.frames)
        held = source.feature_cache.video(clip.key.partition("/")[2])
        seen.add(held.attributes.view.kind)
        assert clip.map_TRHW.shape[2:] == held.attributes.map_hw
        assert clip.targets.image_hw == held.attributes.image_hw
        crop, tracks = held.attributes.view.crop, source.labels.tracks_of(dataset.stream.draw(index).video_id)
        for row, identity in enumerate(clip.targets.identities_N.tolist()):
            for column, frame in enumerate(clip.frames):
                rle = tracks[identity].segmentations[frame]
                dense = np.zeros(held.attributes.original_hw) if rle is None else masks.mask(rle)
                if rle is not None and crop is not None:
                    dense = dense[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]
                expected = np.zeros(held.attributes.image_hw)
                for y in range(expected.shape[0]):
                    for_row = dense[int((y + 0.5) * dense.shape[0] / expected.shape[0])]
                    columns = ((np.arange(expected.shape[1]) + 0.5) * dense.shape[1] / expected.shape[1]).astype(int)
                    expected[y] = for_row[columns]
                if held.attributes.view.flip:
                    expected = expected[:, ::-1]
                assert np.array_equal(clip.targets.masks_NThw[row, column].numpy(), expected)
    assert seen == {"", "flip", "crop-edge80-flip"}


def test_the_frames_of_a_clip_do_not_depend_on_the_views(views: Settings, tiny_data: Path, tiny_cache: Path) -> None:
    plain = dataset_of(tiny_settings(tiny_data, tiny_cache, tiny_cache))
    viewed = dataset_of(views)
    for index in range(6):
        assert plain.stream.draw(index) == viewed.stream.draw(index)


def test_training_runs_and_missing_views_are_refused(views: Settings, tiny_data: Path, tiny_cache: Path) -> None:
    assert (train(views) / "checkpoint.pt").exists()
    with pytest.raises(IncompleteVideo, match=r"@flip'[\s\S]*make extract"):
        train(tiny_settings(tiny_data, tiny_cache, tiny_cache / "none", VIEWS))


def test_the_tools_know_views(views: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(views.cache.path) / "train"
    feature_cache = FeatureCache.open(path)
    assert not list(verify_root(feature_cache)) and not list(verify_video(feature_cache, "1@flip"))
    assert prunable(feature_cache) == []
    assert cache_main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "5 views flip" in printed and "5 views crop-edge80-flip" in printed
    cache_main(["export", str(path), str(tmp_path / "train.h5")])
    assert summarise(tmp_path / "train.h5").videos == 15


def test_a_crop_is_the_videos_own_and_stays() -> None:
    settings = Settings()
    settings.data.views = [ViewSettings(crop=0.5)]
    videos = [Video(id=n, width=40, height=30, length=1, file_names=("a",)) for n in range(20)]
    crops = [train_views(settings, video)[1].crop for video in videos]
    assert crops == [train_views(settings, video)[1].crop for video in videos]
    assert len(set(crops)) > 10
    assert all(crop is not None and crop[2:] == (15, 20) and crop[0] <= 15 and crop[1] <= 20 for crop in crops)
    assert train_views(settings, videos[0])[0] == View()
    settings.data.views = [ViewSettings(crop=0.5, crop_seed=seed) for seed in range(20)]
    assert len({view.crop for view in train_views(settings, videos[7])[1:]}) > 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.views=[{flip: false}]", "differ from each other and from the video itself"),
        ("data.views=[{flip: true}, {flip: true}]", "differ from each other"),
        ("data.views=[{crop: 1.5}]", "a share"),
        ("data.views=[{short_edge: 3}]", "32 to 1333"),
        ("data.views=[{flop: true}]", "flop"),
    ],
)
def test_impossible_views_are_refused(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_settings(tmp_path, tmp_path, tmp_path, words)
