"""Clips linked by mask IoU, worked by hand; token pruning; the tables of ablations; the benchmarks in miniature."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import ConfigError
from cache.heads import DetectorHeads
from cache.labels import masks
from cache.labels.masks import Rle
from configs.schema import Settings
from evaluate import ablate as ablation
from evaluate.bench import max_frames
from evaluate.bench.inference import VideoProblem, measure
from evaluate.bench.max_frames import Fit, parse_bytes
from evaluate.bench.memory import in_own_process
from evaluate.stage import evaluate
from evaluate.stored import load_metrics, stored_methods
from evaluate.tracks.association import ClipTracks, Matching, assign, clip_ranges, link
from evaluate.tracks.predictors import prune_queries
from train_head.bench.measuring import Memory, _status
from train_head.losses.detector_predictions import FrozenHeads

HW = (4, 6)


def block(left: int, width: int = 2) -> Rle:
    mask = np.zeros(HW, bool)
    mask[:, left : left + width] = True
    return masks.encode(mask)


def clip(frames: range, probability: list[list[float]], tracks: list[list[Rle | None]]) -> ClipTracks:
    return ClipTracks(
        frames=frames,
        probability_MK=torch.tensor(probability),
        foreground_M=torch.full((len(tracks),), 8.0),
        area_M=torch.full((len(tracks),), 10.0),
        masks=tuple(tracks),
    )


@pytest.mark.parametrize("length", [1, 2, 5, 6, 20])
def test_clips_cover_the_video_and_share_half(length: int) -> None:
    for num_frames in (1, 2, 5, 13, 40):
        clips = clip_ranges(num_frames, length)
        assert sorted({frame for frames in clips for frame in frames}) == list(range(num_frames))
        assert all(len(frames) == length for frames in clips[:-1]) and len(clips[-1]) >= min(1, num_frames)
        assert all(a.stop - b.start == length // 2 for a, b in pairwise(clips))


def test_greedy_takes_the_best_pair_hungarian_the_best_sum() -> None:
    ious = np.array([[0.6, 0.5], [0.5, 0.0]])
    assert sorted(assign(ious, Matching.greedy)) == [(0, 0), (1, 1)]
    assert sorted(assign(ious, Matching.hungarian)) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("matching", list(Matching))
def test_tracks_go_on_where_their_masks_agree(matching: Matching) -> None:
    """Left and right swap their rows in the second clip; a third object comes, the left one goes."""
    left, right, middle = block(0), block(4), block(2)
    first = clip(range(2), [[0.9, 0.1], [0.2, 0.6]], [[left, left], [right, right]])
    second = clip(range(1, 3), [[0.4, 0.8], [0.7, 0.3]], [[right, right], [left, None]])
    third = clip(range(2, 4), [[0.4, 0.2], [0.5, 0.1]], [[right, right], [middle, middle]])
    tracks = link([first, second, third], HW, matching, top_k=3)
    found = {
        (label, tuple(m)): score for label, score, m in zip(tracks.labels, tracks.scores, tracks.masks, strict=True)
    }
    assert found == {
        (0, (left, left, None, None)): pytest.approx(0.8 * 0.8),
        (1, (right, right, right, right)): pytest.approx((0.6 + 0.8 + 0.2) / 3 * 0.8),
        (0, (None, None, middle, middle)): pytest.approx(0.5 * 0.8),
    }


def test_tracks_go_on_from_an_iou_of_a_tenth_and_the_earlier_clip_decides_shared_frames() -> None:
    wide, hw = np.arange(40), (1, 40)
    first, *later = (masks.encode(((wide >= left) & (wide < left + 20))[None]) for left in (0, 16, 17))
    for mask, num_tracks in zip(later, (1, 2), strict=True):  # IoU 4 / 36 = .11, then 3 / 37 = .08
        clips = [clip(range(2), [[0.9]], [[first, first]]), clip(range(1, 3), [[0.9]], [[mask, mask]])]
        tracks = link(clips, hw, Matching.hungarian, top_k=10)
        whole = [(first, first, mask)] if num_tracks == 1 else [(first, first, None), (None, mask, mask)]
        assert sorted(map(list, tracks.masks), key=str) == sorted(map(list, whole), key=str)


def test_adjacent_clips_compare_their_nearest_frames() -> None:
    clips = [clip(range(t, t + 1), [[0.9], [0.8]], [[block(t % 2)], [block(4)]]) for t in range(3)]
    swapped = clip(range(3, 4), [[0.8], [0.9]], [[block(4)], [block(1)]])
    tracks = link([*clips, swapped], HW, Matching.hungarian, top_k=10)
    assert [tuple(track) for track in tracks.masks] == [
        (block(0), block(1), block(0), block(1)),
        (block(4),) * 4,
    ]


def test_pruning_keeps_what_is_least_likely_nothing() -> None:
    """The class layer reads the no-object logit off the only channel."""
    arrays = {
        "decoder_norm.weight": np.ones(1), "decoder_norm.bias": np.zeros(1),
        "class_embed.weight": np.array([[0.0], [1.0]]), "class_embed.bias": np.zeros(2),
        "mask_embed.layers.0.weight": np.ones((1, 1)), "mask_embed.layers.0.bias": np.zeros(1),
        "mask_embed.layers.1.weight": np.ones((1, 1)), "mask_embed.layers.1.bias": np.zeros(1),
        "mask_embed.layers.2.weight": np.ones((1, 1)), "mask_embed.layers.2.bias": np.zeros(1),
        "mask_features.weight": np.ones((1, 1)), "mask_features.bias": np.zeros(1),
    }  # fmt: skip
    float32 = {name: value.astype(np.float32) for name, value in arrays.items()}
    frozen = FrozenHeads(DetectorHeads(arrays=float32, category_names=()))
    queries = torch.tensor([[3.0, -1.0, 2.0, -4.0], [0.0, 1.0, 2.0, 3.0]])[..., None]
    kept = prune_queries(frozen, queries, 0.5)
    assert kept.slots_tq.tolist() == [[1, 3], [0, 1]]
    assert kept.tokens_tqC[..., 0].tolist() == [[-1.0, -4.0], [0.0, 1.0]]
    assert prune_queries(frozen, queries, 0.01).slots_tq.tolist() == [[3], [0]]
    assert prune_queries(frozen, queries, 1.0).slots_tq.tolist() == [[0, 1, 2, 3]] * 2


def test_ablations_of_a_run(tiny_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole videos in each table are those of `evaluate run`; associations are kept for `compare`."""
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / tiny_run.name)
    tiny_run = replace(tiny_run, runs=str(tmp_path))  # other tests look at what the shared run keeps
    head = evaluate(tiny_run).metrics["head"]
    assert head is not None
    monkeypatch.setattr(ablation, "CLIP_LENGTHS", (1, 4))
    folder = Path(tiny_run.runs) / tiny_run.name
    same = {"windows": "W = 6", "pruning": "kept 1.00", "topk": "top 10", "association": "whole videos"}
    for what, variant in same.items():
        table = ablation.ablate(what, tiny_run)
        stored = json.loads((folder / f"ablate_{what}.json").read_text())
        rows = {row["variant"]: row["metrics"] for row in stored["rows"]}
        assert rows[variant]["AP"] == head.AP and rows[variant]["AR10"] == head.AR10
        assert all(f"| {name} |" in table for name in rows)
    method = "clips4-hungarian"
    assert method in stored_methods(folder)
    assert load_metrics(folder, method)["AP"] == rows["clips of 4, hungarian"]["AP"]


def test_the_plain_side_of_the_benchmark_finds_the_same() -> None:
    problem = VideoProblem(
        frames=7, image_hw=(44, 60), queries=10, channels=32, ffn=64, enc_layers=3, dec_layers=2, top_k=5, block=3
    )
    found = measure(problem, turns=1)
    assert found.largest_score_difference < 1e-5 and found.share_of_pixels_that_differ < 1e-5


def test_amounts_of_memory_and_the_longest_video() -> None:
    assert [parse_bytes(text) for text in ("12GiB", "800 MB", "1e9")] == [12 * 2**30, 800_000_000, 10**9]
    with pytest.raises(ConfigError, match="such as 12GiB"):
        parse_bytes("much")
    fit = Fit(short=100 + 48 * 10, long=100 + 144 * 10, streamed=0)
    assert fit.longest(100 + 700 * 10) == 700


def held_by_the_heap() -> int:
    """Bytes of 200 MB of freed tensors that stay with the process, for the few between them that live on."""
    max_frames._return_freed_memory()
    memory = Memory(torch.device("cpu"))
    tensors = [torch.ones(25_000) for _ in range(2_000)]
    tensors = tensors[::100]
    return _status("VmRSS") - memory.idle


def test_peaks_of_memory_do_not_depend_on_what_the_heap_holds_on_to() -> None:
    assert in_own_process(held_by_the_heap) < 20_000_000
