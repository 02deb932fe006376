from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import AnnotationError, IncompleteVideo
from cache.labels import masks
from cache.labels.annotations import load_labels
from cache.layout import View
from cache.media.geometry import Transform
from cache.reader import FeatureCache
from train_head.data.clip_labels import read_targets, remembered_mask, shown_mask
from train_head.data.clips import ClipConfig, ClipDataset, ClipSource, ClipStream, draw_frames


def open_dataset(features: Path, seed: int = 3) -> ClipDataset:
    feature_cache = FeatureCache.open(features / "train")
    source = ClipSource(feature_cache=feature_cache, labels=feature_cache.labels())
    return dataset_of([source], seed)


def dataset_of(sources: list[ClipSource], seed: int = 3) -> ClipDataset:
    config = ClipConfig(num_frames=4, frame_range=2, seed=seed)
    stream = ClipStream([source.labels for source in sources], [source.ratio for source in sources], config)
    return ClipDataset(sources, stream)


@pytest.mark.parametrize("length", [1, 2, 3, 9, 40])
def test_frames_lie_around_a_reference_frame(length: int) -> None:
    seen: set[int] = set()
    for seed in range(200):
        frames = draw_frames(np.random.default_rng(seed), length, 5, 3)
        assert len(frames) == 5
        assert list(frames) == sorted(frames)
        assert frames[0] >= 0 and frames[-1] < length
        assert frames[-1] - frames[0] <= 6
        seen.update(frames)
    assert seen == set(range(length))


def test_the_reference_frame_comes_once_where_there_are_others() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        reference = int(np.random.default_rng(seed).integers(10))
        assert draw_frames(rng, 10, 6, 20).count(reference) == 1


def test_every_epoch_visits_every_labelled_video_once(tiny_cache: Path) -> None:
    stream = open_dataset(tiny_cache).stream
    (video_ids,) = stream.video_ids
    count = len(video_ids)
    epochs = [[stream.video_at(i) for i in range(start, start + count)] for start in (0, count, 2 * count)]
    assert all(sorted(epoch) == [(0, video_id) for video_id in sorted(video_ids)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_clip_depends_on_seed_and_index_alone(tiny_cache: Path) -> None:
    first, second = open_dataset(tiny_cache), open_dataset(tiny_cache)
    clips = {index: first.read(index, np.empty) for index in (9, 0, 4)}
    for index in (4, 9, 0):
        again = second.read(index, np.empty)
        assert again.key == clips[index].key
        assert again.frames == clips[index].frames
        assert torch.equal(again.map_TRHW, clips[index].map_TRHW)
        assert torch.equal(again.targets.masks_NThw, clips[index].targets.masks_NThw)
    other = open_dataset(tiny_cache, seed=4)
    assert any(other.stream.draw(i) != first.stream.draw(i) for i in range(6))


def test_a_clip_carries_the_cached_frames_and_the_labels_of_them(tiny_cache: Path) -> None:
    dataset = open_dataset(tiny_cache)
    clip, video_id = dataset.read(1, np.empty), dataset.stream.draw(1).video_id
    source = dataset.sources[0]
    cached = source.feature_cache.video(str(video_id))
    for position, frame in enumerate(clip.frames):
        assert np.array_equal(clip.map_TRHW[position].numpy(), cached.mask_features([frame])[0])
        assert np.array_equal(clip.frame_queries_TLQC[position].numpy(), cached.frame_queries([frame])[0])
    tracks = source.labels.tracks_of(video_id)
    for row, identity in enumerate(clip.targets.identities_N.tolist()):
        track = tracks[identity]
        assert clip.targets.labels_N[row] == source.labels.category_index[track.category_id]
        for position, frame in enumerate(clip.frames):
            rle = track.segmentations[frame]
            expected = np.zeros(clip.targets.image_hw) if rle is None else masks.mask(rle)
            assert np.array_equal(clip.targets.masks_NThw[row, position].numpy(), expected)
            assert bool(clip.targets.present_NT[row, position]) == bool(expected.any())


def test_labels_are_resized_to_the_networks_input(tiny_cache: Path) -> None:
    labels = load_labels(tiny_cache / "train" / "annotations.json")
    track = labels.tracks[0]
    frame = next(i for i, rle in enumerate(track.segmentations) if rle is not None)
    video = labels.video_by_id[track.video_id]
    transform = Transform.resize((video.height, video.width), (2 * video.height, 2 * video.width))
    doubled = read_targets(labels, video.id, [frame], [transform])
    row = doubled.identities_N.tolist().index(labels.tracks_of(video.id).index(track))
    rle = track.segmentations[frame]
    assert rle is not None
    assert np.array_equal(doubled.masks_NThw[row, 0].numpy(), masks.mask(rle).repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [(24, 36), (36, 54)])
def test_remembered_masks_are_the_decoded_ones(size: tuple[int, int]) -> None:
    """Cut out and mirrored, as a view does; no pixel, one, many."""
    for pixels in (0, 1, 300):
        mask = np.zeros(24 * 36, np.uint8)
        mask[np.random.default_rng(pixels).choice(24 * 36, pixels, replace=False)] = 1
        rle = masks.encode(mask.reshape(24, 36))
        for transform in (
            Transform.resize((24, 36), size),
            Transform(crop=(3, 5, 16, 24), size=size, flip=True),
        ):
            for _ in range(2):
                remembered = remembered_mask(rle, transform)
                assert np.array_equal(remembered, shown_mask(rle, transform))
                assert remembered.flags.c_contiguous or size == (24, 36)


def test_objects_that_are_not_seen_are_left_out(tiny_cache: Path) -> None:
    """Some have no mask in any of the frames, one has masks but is cut away: all others keep their numbers."""
    labels = load_labels(tiny_cache / "train" / "annotations.json")
    video = labels.videos[0]
    full, corner = np.ones((video.height, video.width), np.uint8), np.zeros((video.height, video.width), np.uint8)
    corner[:2, :2] = 1
    shapes = [full, None, corner, full]
    template = labels.tracks[0]
    tracks = tuple(
        replace(template, id=n, segmentations=(None if shape is None else masks.encode(shape),) * video.length)
        for n, shape in enumerate(shapes)
    )
    cut = Transform(crop=(10, 10, 20, 20), size=(20, 20))
    targets = read_targets(replace(labels, tracks=tracks), video.id, [0, 1], [cut] * 2)
    assert targets.identities_N.tolist() == [0, 3] and targets.masks_NThw.all()
    whole = Transform.resize(full.shape, full.shape)
    assert read_targets(replace(labels, tracks=tracks), video.id, [0], [whole]).identities_N.tolist() == [0, 2, 3]


def test_videos_without_objects_or_features_are_refused(tiny_cache: Path) -> None:
    feature_cache = FeatureCache.open(tiny_cache / "train")
    labels = feature_cache.labels()
    with pytest.raises(AnnotationError, match="no video with a labelled object"):
        dataset_of([ClipSource(feature_cache=feature_cache, labels=labels.subset([]))])
    with pytest.raises(IncompleteVideo, match="make extract"):
        dataset_of([ClipSource(feature_cache=FeatureCache.open(tiny_cache / "valid"), labels=labels)])
    flipped = {video.id: (View(), View(flip=True)) for video in labels.videos}
    with pytest.raises(IncompleteVideo, match=r"'1@flip'[\s\S]*make extract"):
        dataset_of([ClipSource(feature_cache=feature_cache, labels=labels, views=flipped)])


def test_a_clip_on_the_device_leaves_its_memory_free(tiny_cache: Path) -> None:
    """What a loader read it into is filled anew once nothing refers to it: labels that stay on the host are copies."""
    clip = open_dataset(tiny_cache).read(0, np.empty)
    placed = clip.placed(lambda tensor: tensor.clone(), slice(None))
    for ours, theirs in ((placed, clip), (placed.targets, clip.targets)):
        for name, tensor in vars(ours).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, vars(theirs)[name]) and tensor.data_ptr() != vars(theirs)[name].data_ptr()
