"""Whole-video inference against the original VITA's numbers (tests/golden/vita_infer)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache.labels.masks import mask
from evaluate.tracks.inference import VideoTracks, predict_video
from tests.test_head_parity import golden_head
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.mask_folding import MapDecoding

GOLDEN = Path(__file__).parent / "golden" / "vita_infer"
IMAGE_HW, ORIGINAL_HW = (90, 160), (180, 320)


def pixels(tracks: VideoTracks, hw: tuple[int, int]) -> np.ndarray:
    frames = [
        [np.zeros(hw, bool) if rle is None else mask(rle).astype(bool) for rle in track] for track in tracks.masks
    ]
    return np.array(frames)


def run(chunk: int, map_TRHW: Tensor, decoding: MapDecoding, top_k: int = 10) -> VideoTracks:
    queries = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["frame_queries"])
    return predict_video(
        golden_head(),
        map(TokenBlock.whole_frames, queries.split(chunk)),
        map_TRHW.split(chunk),
        num_frames=len(queries),
        decoding=decoding,
        image_hw=IMAGE_HW,
        original_hw=ORIGINAL_HW,
        top_k=top_k,
    )


@pytest.fixture(scope="module")
def feature_map() -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / "inputs.npz")["raw_mask_features"])


@pytest.fixture(scope="module")
def tracks(feature_map: Tensor) -> VideoTracks:
    return run(4, feature_map, MapDecoding())


def test_scores_labels_and_queries(tracks: VideoTracks) -> None:
    golden = np.load(GOLDEN / "outputs.npz")
    keys = list(zip(golden["query_index"].tolist(), golden["labels"].tolist(), strict=True))
    scores = dict(zip(zip(tracks.query_index, tracks.labels, strict=True), tracks.scores, strict=True))
    quality = dict(zip(tracks.query_index, tracks.mask_quality, strict=True))
    assert scores.keys() == set(keys)
    for key, score, expected in zip(keys, golden["scores"], golden["mask_quality"], strict=True):
        assert scores[key] == pytest.approx(float(score), abs=1e-5)
        assert quality[key[0]] == pytest.approx(float(expected), abs=1e-5)


def test_masks_but_for_pixels_near_zero(tracks: VideoTracks) -> None:
    golden = np.load(GOLDEN / "outputs.npz")
    expected = np.unpackbits(golden["masks_packed"], axis=-1)[..., : ORIGINAL_HW[1]].astype(bool)
    order = [tracks.query_index.index(query) for query in golden["query_index"].tolist()]
    different = int((pixels(tracks, ORIGINAL_HW)[order] != expected).sum())
    allowed = json.loads((GOLDEN / "meta.json").read_text())["output_logits_near_zero"]["lt_1e-4"]
    assert different <= allowed


def test_chunks_do_not_matter(tracks: VideoTracks, feature_map: Tensor) -> None:
    whole = run(13, feature_map, MapDecoding())
    assert whole.labels == tracks.labels and whole.scores == pytest.approx(tracks.scores, abs=1e-5)
    assert (pixels(whole, ORIGINAL_HW) != pixels(tracks, ORIGINAL_HW)).mean() < 1e-5


def test_stored_codec_space_equals_decompressed(feature_map: Tensor) -> None:
    """A map of 64 channels that really has 6: stored as 6, nothing is ever decompressed."""
    generator = torch.Generator().manual_seed(0)
    matrix_CR, mean_C = torch.randn(64, 6, generator=generator), torch.randn(64, generator=generator)
    stored_TRHW = feature_map[:, :6]
    decompressed = torch.einsum("cr,trhw->tchw", matrix_CR, stored_TRHW) + mean_C[:, None, None]
    stored = run(13, stored_TRHW, MapDecoding(matrix_CR=matrix_CR, mean_C=mean_C))
    dense = run(13, decompressed, MapDecoding())
    assert stored.query_index == dense.query_index and stored.labels == dense.labels
    assert stored.scores == pytest.approx(dense.scores, abs=1e-4)
    assert (pixels(stored, ORIGINAL_HW) != pixels(dense, ORIGINAL_HW)).mean() < 1e-4


def test_a_query_with_two_labels_and_an_empty_track(feature_map: Tensor) -> None:
    """All 75 (query, label) pairs of the grid: five tracks share a query's masks; empty masks are None."""
    head = golden_head()
    with torch.no_grad():
        head.vita_mask_features.weight[1:].zero_()
    queries = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["frame_queries"][:2])
    found = predict_video(
        head,
        [TokenBlock.whole_frames(queries)],
        [feature_map[:2]],
        num_frames=2,
        decoding=MapDecoding(),
        image_hw=(90, 160),
        original_hw=(90, 160),
        top_k=99,
    )
    assert len(found.labels) == 75 and len(set(zip(found.query_index, found.labels, strict=True))) == 75
    outputs = head.predict(queries)
    with torch.no_grad():
        logits = torch.einsum("qc,tchw->qthw", outputs.mask_embed_VC, head.vita_mask_features(feature_map[:2]))
    upsampled = F.interpolate(logits, scale_factor=4, mode="bilinear")[..., :90, :160]
    expected = (upsampled > 1e-4).flatten(2).any(dim=2)
    doubtful = (upsampled.abs() < 1e-4).flatten(2).any(dim=2)
    seen_empty = 0
    for track, query in zip(found.masks, found.query_index, strict=True):
        for frame, rle in enumerate(track):
            if not doubtful[query, frame]:
                assert (rle is not None) == bool(expected[query, frame])
                seen_empty += rle is None
    assert seen_empty > 0


def test_a_map_cut_to_the_image_equals_the_padded_one(feature_map: Tensor) -> None:
    """An input of 75 × 130 in a canvas of 96 × 160: 19 + 1 rows and 33 + 1 columns of the map suffice."""
    queries = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["frame_queries"])
    whole, cut = (
        predict_video(
            golden_head(),
            [TokenBlock.whole_frames(queries)],
            [stored],
            num_frames=len(queries),
            decoding=MapDecoding(),
            image_hw=(75, 130),
            original_hw=(100, 200),
            top_k=10,
        )
        for stored in (feature_map, feature_map[:, :, :20, :34])
    )
    assert cut.scores == pytest.approx(whole.scores, abs=1e-6)
    assert (pixels(cut, (100, 200)) != pixels(whole, (100, 200))).mean() < 1e-5
