"""Frames of unusual kinds through the real detector: used as they are, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import AnnotationError, CacheError, FrameError
from cache.reader import FeatureCache
from extract.stage import extract
from tests.conftest import tiny_settings


def data_of(root: Path, image: Image.Image, name: str = "1/00000.jpg", video_id: int | str = 1) -> Path:
    """A train set of one video of one frame."""
    frames = root / "train" / "JPEGImages"
    file = frames / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    video = {"id": video_id, "width": image.width, "height": image.height, "length": 1, "file_names": [name]}
    labels = {"videos": [video], "annotations": [], "categories": [{"id": 1, "name": "circle"}]}
    (root / "train.json").write_text(json.dumps(labels))
    return root


def extracted(root: Path) -> FeatureCache:
    words = ("data.valid_labels=null", "data.valid_frames=null", "detector.short_edge=32")
    extract(tiny_settings(root, root / "features", root, *words))
    return FeatureCache.open(root / "features" / "train")


def test_cmyk_is_read_as_the_colours_it_prints(tmp_path: Path) -> None:
    red = Image.new("CMYK", (64, 48), (0, 255, 255, 0))
    inked = extracted(data_of(tmp_path / "cmyk", red)).video("1").frame_queries()
    shone = extracted(data_of(tmp_path / "rgb", red.convert("RGB"))).video("1").frame_queries()
    np.testing.assert_allclose(inked, shone, atol=0.05)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 8)])
def test_tiny_and_very_wide_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    video = extracted(data_of(tmp_path, Image.new("RGB", size, (90, 120, 30)))).video("1")
    assert video.attributes.original_hw == (size[1], size[0])
    assert np.isfinite(video.mask_features()).all()


def test_names_beyond_ascii(tmp_path: Path) -> None:
    feature_cache = extracted(data_of(tmp_path, Image.new("RGB", (40, 32)), "vidéo 一/ß.jpg"))
    assert feature_cache.labels().videos[0].file_names == ("vidéo 一/ß.jpg",)


def test_a_label_file_that_is_not_there(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tmp_path / "features", tmp_path)
    with pytest.raises(
        AnnotationError, match=r"/train.json: no such label file(.|\n)*data\.root and data\.train_labels"
    ):
        extract(settings)


def test_videos_without_frames_and_names_that_leave_the_data(tmp_path: Path) -> None:
    root = data_of(tmp_path, Image.new("RGB", (40, 32)))
    labels = json.loads((root / "train.json").read_text())
    for change, error in (
        ({"length": 0, "file_names": []}, AnnotationError),
        ({"file_names": ["../../../secret.jpg"]}, AnnotationError),
        ({"file_names": ["/etc/passwd"]}, AnnotationError),
        ({"id": "../1"}, (AnnotationError, CacheError)),
        ({"width": 41}, FrameError),
    ):
        broken = {**labels, "videos": [{**labels["videos"][0], **change}]}
        (root / "train.json").write_text(json.dumps(broken))
        with pytest.raises(error):
            extracted(root)
