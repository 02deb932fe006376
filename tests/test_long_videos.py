"""Videos in blocks against videos at once: tracks, packed run lengths, and what runs in threads of its own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cache.labels import masks
from cache.labels.tracks import Video
from evaluate.metrics.video_iou import TrackMasks, track_ious
from evaluate.tracks.inference import predict_video
from evaluate.tracks.mask_store import MaskStore, StoredMasks
from evaluate.tracks.read_ahead import read_ahead
from tests.test_streaming import SLOTS, blocks_of, small_head
from train_head.heads.mask_folding import MapDecoding
from train_head.heads.vita import VitaHead


@functools.cache
def inputs(num_frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frame queries (T, Q, 6) and maps (T, 4, 5, 6) with frames in which nothing is."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(num_frames, 4, 5, 6, generator=generator)
    maps[torch.rand(num_frames, generator=generator) < 0.3] = 0
    return torch.randn(num_frames, SLOTS, 6, generator=generator), maps


@torch.no_grad()
def at_once(
    head: VitaHead, tokens: Tensor, maps: Tensor, image_hw: tuple[int, int], original_hw: tuple[int, int], top_k: int
) -> dict[tuple[int, int], tuple[float, Tensor]]:
    """The release's inference, literally: (query, label) -> score and up-sampled logits (T, h, w)."""
    outputs = head.predict(tokens)
    probability = outputs.class_logits_VK.softmax(dim=-1)[:, :-1]
    found = {}
    for index in probability.flatten().topk(top_k).indices.tolist():
        query, label = divmod(index, probability.shape[1])
        logits = torch.einsum("c,tchw->thw", outputs.mask_embed_VC[query], head.vita_mask_features(maps))[None]
        logits = F.interpolate(logits, scale_factor=4, mode="bilinear")[..., : image_hw[0], : image_hw[1]]
        foreground = logits.sigmoid()[logits.sigmoid() > 0.5]
        quality = foreground.sum() / (len(foreground) + 1e-6)
        final = F.interpolate(logits, size=original_hw, mode="bilinear")[0]
        found[query, label] = (float(probability[query, label] * quality), final)
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_frames=st.integers(1, 20),
    token_blocks=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    map_block=st.integers(1, 9),
    window=st.integers(0, 6),
    cut=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    original_hw=st.tuples(st.integers(7, 50), st.integers(7, 50)),
    top_k=st.integers(1, 12),
    seed=st.integers(0, 4),
)
def test_tracks_do_not_depend_on_the_blocks(
    num_frames: int,
    token_blocks: list[int],
    map_block: int,
    window: int,
    cut: tuple[int, int],
    original_hw: tuple[int, int],
    top_k: int,
    seed: int,
) -> None:
    head, image_hw = small_head(2, 2), (20 - cut[0], 24 - cut[1])
    object.__setattr__(head.config, "window", window)
    tokens, maps = inputs(num_frames, seed)
    with torch.no_grad():
        head.vita_mask_features.bias.fill_(-0.05)
    expected = at_once(head, tokens, maps, image_hw, original_hw, top_k)
    tracks = predict_video(
        head,
        blocks_of(tokens, None, token_blocks),
        maps.split(map_block),
        num_frames=num_frames,
        decoding=MapDecoding(),
        image_hw=image_hw,
        original_hw=original_hw,
        top_k=top_k,
    )
    assert set(zip(tracks.query_index, tracks.labels, strict=True)) == set(expected)
    for query, label, score, rles in zip(tracks.query_index, tracks.labels, tracks.scores, tracks.masks, strict=True):
        expected_score, logits = expected[query, label]
        assert score == pytest.approx(expected_score, abs=1e-5)
        empty = np.zeros(original_hw, bool)
        pixels = np.array([empty if rle is None else masks.mask(rle).astype(bool) for rle in rles])
        certain = logits.abs().numpy() > 1e-5
        assert ((pixels == (logits > 0).numpy()) | ~certain).all()
        assert all((rle is None) == (not frame.any()) for rle, frame in zip(rles, pixels, strict=True))


def test_packed_masks_are_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory and, after the first bytes, in a file."""
    monkeypatch.setattr("evaluate.tracks.mask_store._HELD_BYTES", 5)
    rng = np.random.default_rng(0)
    frames = [[masks.encode(rng.random((5, 7)) < 0.5) if rng.random() < 0.7 else None for _ in "ab"] for _ in range(9)]
    store = MaskStore(2, (5, 7))
    for frame, row in enumerate(frames):
        store.add_frames(1)
        for track, rle in enumerate(row):
            if rle is not None:
                store.put(frame, track, rle.counts)
    for track in (0, 1):
        packed = StoredMasks(store, track)
        assert len(packed) == 9 and list(packed) == [row[track] for row in frames]
        assert packed[2:5] == tuple(row[track] for row in frames[2:5])
        assert packed[-1] == frames[-1][track]


def test_reading_ahead_keeps_the_order_and_works_elsewhere() -> None:
    threads = set()

    def numbers() -> Iterator[int]:
        for number in range(20):
            threads.add(threading.current_thread())
            yield number

    assert list(read_ahead(numbers())) == list(range(20))
    assert threading.current_thread() not in threads and len(threads) == 1


def test_reading_ahead_raises_what_the_iterator_raises() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ahead = read_ahead(broken())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_video_iou_beyond_32_bits_of_pixels() -> None:
    """2,200 frames of 1080 x 1920 are 4.6e9 pixels: 1,100 found of the 2,199 that are there, and 1 that is not."""
    height, width, T = 1080, 1920, 2200
    video = Video(id=1, width=width, height=height, length=T, file_names=("x",) * T)
    full = masks.encode(np.ones((height, width), bool))
    truth = TrackMasks.of((full,) * (T - 1) + (None,), video)
    found = TrackMasks.of((full,) * 1100 + (None,) * 1099 + (full,), video)
    assert truth.pixels == height * width * 2199 > 2**32
    assert track_ious([found, truth], [truth]).tolist() == [[1100 / 2200], [1.0]]
