from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cache.errors import CacheError
from cache.heads import HEAD_SHAPES, DetectorHeads
from cache.labels.category_map import category_pairs
from cache.labels.tracks import Category
from cache.layout import video_group_name
from cache.reader import CachedVideo
from configs.schema import Settings
from evaluate.compare.groups import read_groups
from evaluate.report.write import write_report
from evaluate.stage import evaluate
from evaluate.tables import evaluation_table, run_summary
from evaluate.tracks.baseline import follow_queries, track_without_training
from evaluate.tracks.predictors import baseline_predictor
from tests.conftest import tiny_settings
from train_head.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from train_head.data.video_sets import open_evaluation_set
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.detector_predictions import FrozenHeads


def test_shuffled_queries_are_followed_back() -> None:
    generator = torch.Generator().manual_seed(0)
    identity_QC = torch.randn(6, 16, generator=generator)
    orders = [torch.arange(6), *(torch.randperm(6, generator=generator) for _ in range(4))]
    drifting_TQC = torch.stack(
        [(identity_QC + 0.1 * t * torch.randn(6, 16, generator=generator))[order] for t, order in enumerate(orders)]
    )
    followed_TQ = follow_queries(drifting_TQC)
    for order, row in zip(orders, followed_TQ, strict=True):
        assert torch.equal(order[row], torch.arange(6))
    second_tQ = follow_queries(drifting_TQC[2:], drifting_TQC[1, followed_TQ[1]])  # a block that another went before
    assert torch.equal(second_tQ, followed_TQ[2:])


def test_a_video_is_read_in_blocks_and_their_size_does_not_matter(
    tiny_run: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, read = list[int](), CachedVideo.frame_queries

    def noted(video: CachedVideo, frames: Sequence[int] | None = None) -> NDArray[Any]:
        sizes.append(6 if frames is None else len(frames))
        return read(video, frames)

    monkeypatch.setattr(CachedVideo, "frame_queries", noted)
    found = []
    for chunk in (2, 16):
        settings = replace(tiny_run, evaluate=replace(tiny_run.evaluate, chunk_frames=chunk))
        videos = open_evaluation_set(settings)
        cached = videos.feature_cache.video(video_group_name(videos.video_ids[0]))
        found.append(baseline_predictor(settings, videos)(cached))
    assert sizes == [2, 2, 2] * 2 + [6] * 2  # frames; twice each
    small, whole = found
    assert small.labels == whole.labels and small.query_index == whole.query_index
    assert small.scores == pytest.approx(whole.scores, abs=1e-6)
    assert [list(masks_T) for masks_T in small.masks] == [list(masks_T) for masks_T in whole.masks]


def test_tracks_of_a_detector_worked_by_hand() -> None:
    """Two queries that swap places in the second frame; the mask logit of query e at pixel z is (e·z)."""
    sizes = {"C": 2, "E": 2, "F": 2, "K+1": 3}
    arrays = {n: np.zeros([sizes[s] for s in shape], dtype=np.float32) for n, shape in HEAD_SHAPES.items()}
    arrays["decoder_norm.weight"][:] = 1
    for name in ("mask_embed.layers.0", "mask_embed.layers.1", "mask_embed.layers.2", "mask_features"):
        arrays[f"{name}.weight"][:] = np.eye(2)
    arrays["class_embed.weight"][:2] = 4 * np.eye(2)
    heads = DetectorHeads(arrays=arrays, category_names=("cat", "dog"))
    frozen = FrozenHeads(heads)
    queries_TQC = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]]])
    map_TRHW = torch.full((2, 2, 2, 2), -1.0)
    map_TRHW[:, 0, :, 0] = 1.0  # the first query's half is on the left in both frames
    map_TRHW[:, 1, :, 1] = 1.0
    tracks = track_without_training(
        frozen,
        lambda: frozen.normed(queries_TQC).split(1),
        map_TRHW.split(1),
        decoding=MapDecoding(),
        label_map_KJ=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),  # label 0 is dog, label 1 is cat
        image_hw=(8, 8),
        original_hw=(8, 8),
        top_k=2,
    )
    assert sorted(tracks.labels) == [0, 1]
    from cache.labels import masks

    for label, masks_T in zip(tracks.labels, tracks.masks, strict=True):
        left = [rle is not None and bool(masks.mask(rle)[:, 0].all()) for rle in masks_T]
        right = [rle is not None and bool(masks.mask(rle)[:, -1].all()) for rle in masks_T]
        assert (left, right) == (([False] * 2, [True] * 2) if label == 0 else ([True] * 2, [False] * 2))


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("known", [0, 1])
def test_labels_that_the_detector_does_not_know_are_never_predicted(
    tiny_run: Settings, monkeypatch: pytest.MonkeyPatch, known: int, repeats: bool
) -> None:
    settings = replace(tiny_run, evaluate=replace(tiny_run.evaluate, top_k=10_000, repeats=repeats))
    videos = open_evaluation_set(settings)
    monkeypatch.setattr("evaluate.tracks.predictors.known_categories", lambda _: [(2, 0)][:known])
    cached = videos.feature_cache.video(video_group_name(videos.video_ids[0]))
    tracks = baseline_predictor(settings, videos)(cached)
    num_queries = cached.frame_queries([0]).shape[2]
    assert tracks.labels == (2,) * known * num_queries and len(tracks.masks) == len(tracks.labels)


def test_a_baseline_that_knows_no_category_has_no_score(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    """Scores of zero in an order of their own would be scored as if they meant something."""
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / "tiny")
    settings = tiny_settings(tiny_data, tmp_path / "features", tmp_path, "name=tiny")
    shutil.copytree(tiny_cache, tmp_path / "features")
    evaluate(settings)
    assert (tmp_path / "tiny" / "baseline" / "results.zip").exists()
    path = tmp_path / "features" / "valid" / "annotations.json"
    labels = json.loads(path.read_text())
    for category in labels["categories"]:
        category["name"] = f"new {category['name']}"
    path.write_text(json.dumps(labels))
    checkpoint = tmp_path / "tiny" / CHECKPOINT
    names = tuple(category["name"] for category in labels["categories"])
    save_checkpoint(checkpoint, replace(load_checkpoint(checkpoint), category_names=names))
    evaluation = evaluate(settings)
    reason = "the detector knows none of the data set's categories"
    assert evaluation.left_out == {"baseline": reason} and list(evaluation.metrics) == ["head"]
    assert [path.name for path in (tmp_path / "tiny" / "baseline").iterdir()] == ["metrics.json"]
    stored = json.loads((tmp_path / "tiny" / "baseline" / "metrics.json").read_text())
    assert stored["AP"] is None and stored["left_out"] == reason
    for table in (evaluation_table(evaluation), run_summary(settings)):
        assert re.search(r"^baseline( +–){5}$", table, re.MULTILINE) and f"no baseline: {reason}" in table
    page = write_report(settings).read_text()
    assert f'<th scope="row">baseline</th>{"<td>–</td>" * 5}' in page and reason in html.unescape(page)
    assert "ground truth" in page and "<b>baseline</b>" not in page
    with pytest.raises(CacheError, match=f"no predictions of baseline .*{reason}"):
        read_groups([str(tmp_path / "tiny")], ["baseline"])


def test_categories_are_paired_by_table_or_by_name() -> None:
    own = [Category(id=3, name="Star"), Category(id=9, name="ring"), Category(id=11, name="circle")]
    assert category_pairs(own, ["circle", "star", "heart"]) == [(0, 1), (2, 0)]


def test_the_published_tables_are_used_for_the_published_sets() -> None:
    import json
    from pathlib import Path

    golden = json.loads((Path(__file__).parent / "golden" / "categories.json").read_text())
    from extract.detector.coco_names import COCO_CATEGORIES

    names, ids = list(COCO_CATEGORIES.values()), list(COCO_CATEGORIES)
    for dataset in ("ytvis_2019", "ytvis_2021", "ovis"):
        categories = [Category(id=c["id"], name=c["name"]) for c in golden[dataset]]
        pairs = category_pairs(categories, names)
        own_names = [category.name for category in categories]  # of a detector fine-tuned on the data set
        assert category_pairs(categories, own_names) == [(index, index) for index in range(len(categories))]
        found = {(str(ids[detector]), categories[label].id) for label, detector in pairs}
        assert found == {tuple(pair) for pair in golden[f"coco_to_{dataset}"].items()}
