from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.errors import CorruptData
from tests.conftest import tiny_settings
from train_head.build import decoding_of, map_channels
from train_head.data import frame_memory
from train_head.data.clips import Clip, ClipConfig, ClipDataset, ClipStream
from train_head.data.frame_memory import FrameMatchMemory, build_frame_memory, redrawn_classes
from train_head.data.video_sets import VideoSet, open_training_set
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.frame_matches import match_frames


def build(data: Path, features: Path, runs: Path, mode: str) -> tuple[VideoSet, FrameMatchMemory, list[Clip]]:
    settings = tiny_settings(data, features, runs, f"loss.frame_matching={mode}")
    videos = open_training_set(settings)
    heads = videos.feature_cache.heads
    decoding = decoding_of(videos.codec, map_channels(heads))
    config = ClipConfig(num_frames=4, frame_range=3, seed=0)
    dataset = ClipDataset(videos.sources, ClipStream([videos.labels], [1.0], config))
    clips = [dataset.read(i, np.empty) for i in range(8)]
    return videos, build_frame_memory(settings, videos, FrozenHeads(heads), decoding), clips


@pytest.mark.parametrize("mode", ["category_map", "mask_only", "release"])
def test_remembered_matches_equal_fresh_ones(tiny_data: Path, tiny_cache: Path, tmp_path: Path, mode: str) -> None:
    _, memory, clips = build(tiny_data, tiny_cache, tmp_path, mode)
    for clip in clips:
        memory.with_matches(clip)
    for clip in clips:
        _, fresh, _ = build(tiny_data, tiny_cache, tmp_path, mode)
        remembered = memory.with_matches(clip).frame_queries_LTN
        computed = fresh.with_matches(clip).frame_queries_LTN
        assert remembered is not None and computed is not None
        assert torch.equal(remembered, computed)
        present_TN = clip.targets.present_NT.t()
        assert torch.equal(remembered >= 0, present_TN.expand_as(remembered))  # more queries than objects


def test_every_frame_is_matched_once(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, memory, clips = build(tiny_data, tiny_cache, tmp_path, "mask_only")
    matched = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        matched.append(len(arguments[1]))
        return match_frames(*arguments, **options)

    monkeypatch.setattr(frame_memory, "match_frames", counted)
    for clip in (*clips, *clips):
        memory.with_matches(clip)
    frames = {(clip.key, frame) for clip in clips for frame in clip.frames}
    assert sum(matched) == len(frames) < sum(len(clip.frames) for clip in clips)


def test_the_modes_differ_in_their_class_costs(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    maps = {
        m: build(tiny_data, tiny_cache, tmp_path, m)[1].label_map_KJ for m in ("category_map", "mask_only", "release")
    }
    assert maps["category_map"].sum() == 5  # circle, square, triangle, star, cross
    assert maps["mask_only"].sum() == 0
    assert torch.equal(maps["release"], torch.eye(8))


def test_redrawn_classes_replace_the_class_layer_alone(tiny_cache: Path, tiny_data: Path, tmp_path: Path) -> None:
    stored = build(tiny_data, tiny_cache, tmp_path, "mask_only")[0].feature_cache.heads
    first, again, other = (redrawn_classes(stored, 8, seed) for seed in (0, 0, 1))
    assert first.num_classes == 8
    for name, array in stored.arrays.items():
        if name.startswith("class_embed"):
            assert np.array_equal(first.arrays[name], again.arrays[name])
            assert not np.array_equal(first.arrays[name], other.arrays[name])
        else:
            assert first.arrays[name] is array


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["frame_queries_TLQC", "map_TRHW"])
def test_a_frame_that_is_not_finite_is_named(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, field: str, value: float
) -> None:
    """Also where it shows no object, so that nothing is matched there."""
    _, memory, clips = build(tiny_data, tiny_cache, tmp_path, "category_map")
    clip = next(clip for clip in clips if clip.frames.index(clip.frames[2]) == 2)
    features = getattr(clip, field).clone()
    features[2, 0, -1, -1] = value
    hidden = replace(clip.targets, present_NT=clip.targets.present_NT & False)
    for targets in (clip.targets, hidden):
        with pytest.raises(CorruptData) as error:
            memory.with_matches(replace(clip, targets=targets, **{field: features}))
        assert f"the features of {clip.name}, frame {clip.frames[2]}, are not finite" in str(error.value)
        assert f"python -m cache verify {tiny_cache / 'train'}" in str(error.value)
