"""The hold-out split: stable, complete, and never empty on one side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.errors import AnnotationError, CacheError, ConfigError
from cache.labels.annotations import parse_labels
from cache.labels.splits import holdout_split
from cache.labels.tracks import Labels
from cache.preload import held_bytes
from tests.conftest import tiny_settings
from train_head.data.video_sets import open_training_set


def _many_videos(numbers: range) -> Labels:
    videos = [{"id": n, "width": 1, "height": 1, "length": 1, "file_names": [f"v{n}/0.jpg"]} for n in numbers]
    return parse_labels({"categories": [{"id": 1, "name": "a"}], "videos": videos}, "train.json")


def test_holdout_is_stable_when_videos_are_added_or_reordered() -> None:
    small = holdout_split(_many_videos(range(200)), 0.25, seed=3)
    large = holdout_split(_many_videos(range(999, -1, -1)), 0.25, seed=3)
    assert set(small.train_ids) | set(small.holdout_ids) == set(range(200))
    assert not set(small.train_ids) & set(small.holdout_ids)
    assert set(small.holdout_ids) == {video for video in large.holdout_ids if video < 200}
    # 1000 draws at 0.25: 3.7 standard deviations.
    assert 200 < len(large.holdout_ids) < 300
    assert set(holdout_split(_many_videos(range(200)), 0.25, seed=4).holdout_ids) != set(small.holdout_ids)
    assert json.loads(json.dumps(small.to_json())) == {
        "rule": small.rule,
        "train_ids": list(small.train_ids),
        "holdout_ids": list(small.holdout_ids),
    }
    assert "'3:'" in small.rule
    assert "0.25" in small.rule


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_holdout_leaves_a_video_on_each_side(fraction: float) -> None:
    split = holdout_split(_many_videos(range(5)), fraction, seed=0)
    assert min(len(split.train_ids), len(split.holdout_ids)) == 1


def test_impossible_holdouts_are_refused() -> None:
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="fraction"):
            holdout_split(_many_videos(range(5)), fraction, seed=0)
    with pytest.raises(AnnotationError, match="1 videos in 1 folders"):
        holdout_split(_many_videos(range(1)), 0.5, seed=0)


def test_what_is_held_out_is_not_mixed_in_from_another_cache(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = f"train.mix=[{{cache: {tiny_cache / 'train'}}}, {{cache: {tiny_cache / 'valid'}}}]"
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "data.holdout=0.4", mix)
    own, again, others = ({video.name for video in s.labels.videos} for s in open_training_set(settings).sources)
    assert 0 < len(own) < 5 and own == again and len(others) == 2
    assert f"{5 - len(own)} of 5 videos are held out" in capsys.readouterr().out


def test_preloading_counts_what_is_mixed_in(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = f"train.mix=[{{cache: {tiny_cache / 'valid'}}}]"
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, mix, "cache.preload=true")
    sources = open_training_set(settings).sources
    held = [held_bytes(s.feature_cache, [str(video.id) for video in s.labels.videos]) for s in sources]
    monkeypatch.setattr("cache.preload.available_bytes", lambda: sum(held))
    open_training_set(settings)
    monkeypatch.setattr("cache.preload.available_bytes", lambda: sum(held) - 1)
    with pytest.raises(CacheError, match="keeps 7 videos in the memory of each of 1 processes"):
        open_training_set(settings)
