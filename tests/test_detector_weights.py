"""Names: official checkpoints fit the stock model tensor by tensor, both ways, or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Mask2FormerConfig

from cache.errors import ConfigError, WeightsError
from cache.heads import DetectorHeads
from extract.detector.architectures import infer_config, official_config
from extract.detector.coco_names import COCO_CATEGORIES
from extract.detector.frozen import load_detector
from extract.detector.key_table import from_official, key_table, to_official
from extract.detector.loading import build_on_meta, load_model, official_shapes
from tests.detector_samples import GOLDEN, key_shapes, load_sample, official_state

OFFICIAL_NAMES = {"r50": "r50", "r101": "r101", "swinl": "swin-l"}
NOT_WEIGHTS = ("criterion.empty_weight", "relative_position_index")
NOT_OFFICIAL = ("num_batches_tracked", "encoder.swin.layernorm.", "criterion.empty_weight")


def official_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.endswith(NOT_WEIGHTS)}


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_key_table_is_a_bijection(name: str) -> None:
    config = official_config(OFFICIAL_NAMES[name])
    model, table = build_on_meta(config), key_table(config)
    model_keys = [key for row in table for key in row.model]
    assert len(model_keys) == len(set(model_keys))
    assert set(model_keys) == {k for k in model.state_dict() if not any(part in k for part in NOT_OFFICIAL)}
    assert official_shapes(table, model) == official_weights(key_shapes(name))


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_shapes_alone_tell_the_official_configuration(name: str) -> None:
    assert infer_config(key_shapes(name)).to_dict() == official_config(OFFICIAL_NAMES[name]).to_dict()


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_parameter_counts_are_the_originals(name: str) -> None:
    counts = json.loads((GOLDEN / "param_counts.json").read_text())["mask2former_coco80"][name]
    parameters = dict(build_on_meta(official_config(OFFICIAL_NAMES[name])).named_parameters())
    counted = sum(p.numel() for key, p in parameters.items() if "encoder.swin.layernorm." not in key)
    # the original freezes its batch norms: their weight and bias are buffers there, as mean and variance are
    assert counted - counts["frozen_bn_buffers"] // 2 == counts["parameters"]


@pytest.mark.parametrize("name", ["r50", "swin"])
def test_export_equals_what_was_read(name: str, tmp_path: Path) -> None:
    detector = load_sample(name, tmp_path)
    exported = to_official(key_table(detector.model.config), detector.model.state_dict())
    original = {key.replace("static_query", "query_feat"): t for key, t in official_state(name).items()}
    assert_same_tensors(exported, {key: t for key, t in original.items() if not key.endswith(NOT_WEIGHTS)})


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_model_to_official_and_back(name: str) -> None:
    """Every tensor returns to its place, for the full-size tables with one number per tensor."""
    table = key_table(official_config(OFFICIAL_NAMES[name]))
    state = {key: torch.tensor([float(i)]) for i, key in enumerate(k for row in table for k in row.model)}
    assert_same_tensors(from_official(table, to_official(table, state)), state)


def test_projections_are_stacked_query_key_value() -> None:
    table = key_table(official_config("swin-l"))
    (row,) = [r for r in table if r.official == "backbone.layers.0.blocks.0.attn.qkv.weight"]
    assert [key.split(".")[-2] for key in row.model] == ["q_proj", "k_proj", "v_proj"]


def test_report_says_what_was_matched(tmp_path: Path) -> None:
    report = str(load_sample("r50", tmp_path).report)
    assert "557 tensors matched, 0 unmatched" in report
    assert "static_query.weight read as sem_seg_head.predictor.query_feat.weight" in report
    assert "criterion.empty_weight" in report


@pytest.mark.parametrize("depths", ["enc6dec3", "enc3dec6"])
def test_full_vita_checkpoint_is_a_detector_and_a_head(depths: str, tmp_path: Path) -> None:
    shapes = key_shapes(f"vita_r50_{depths}")
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}  # one number each on disk
    torch.save({"model": state, "iteration": 1}, tmp_path / "vita.pth")
    loaded = load_model(tmp_path / "vita.pth", architecture="r50")
    head_keys = {key for key in shapes if key.startswith("vita_module.")}
    assert set(loaded.report.head_keys) == head_keys
    assert set(loaded.report.ignored_keys) == {"criterion.empty_weight", "vita_criterion.empty_weight"}
    assert loaded.report.matched == len(shapes) - len(head_keys) - 2
    assert loaded.model.config.num_labels == 40
    assert loaded.category_names == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sem_seg_head.predictor.decoder_norm.bias": None},
            "1 missing: sem_seg_head.predictor.decoder_norm.bias",
        ),
        ({"backbone.norm3.extra": torch.zeros(2)}, "1 unexpected: backbone.norm3.extra"),
        (
            {"backbone.norm3.bias": torch.zeros(7)},
            r"1 of wrong shape: backbone.norm3.bias \(7,\), not \(192,\)",
        ),
        ({"sem_seg_head.predictor.class_embed.bias": None}, "class_embed.bias is missing"),
        ({"sem_seg_head.predictor.query_feat.weight": "text"}, "query_feat.weight is not an array"),
    ],
)
def test_partial_loads_are_refused(change: dict[str, Tensor | str | None], message: str, tmp_path: Path) -> None:
    state: dict[str, Tensor | str | None] = {**official_state("swin"), **change}
    path = tmp_path / "model.pth"
    torch.save({"model": {key: value for key, value in state.items() if value is not None}}, path)
    with pytest.raises(WeightsError, match=message) as error:
        load_detector(path)
    assert str(path) in str(error.value)


def test_long_lists_of_keys_are_cut(tmp_path: Path) -> None:
    state = {k: t for k, t in official_state("swin").items() if "adapter_1" not in k and "layer_1" not in k}
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"6 missing: \S+, \S+, \S+, \S+, \S+, \.\.\."):
        load_detector(tmp_path / "model.pth")


def test_named_architecture_is_checked(tmp_path: Path) -> None:
    load_sample("swin", tmp_path)
    with pytest.raises(WeightsError, match=r"expected r101, got swin 24 \[2, 2, 2, 2\](.|\n)*architecture=null"):
        load_detector(tmp_path / "model.pth", architecture="r101")
    with pytest.raises(ConfigError, match="r50, r101, swin-l"):
        load_detector(tmp_path / "model.pth", architecture="r18")


@pytest.mark.parametrize("name", ["r50", "swin"])
def test_hugging_face_folder_gives_the_same_detector(name: str, tmp_path: Path) -> None:
    """Saved by the library itself, which writes Swin under its older names."""
    first = load_sample(name, tmp_path)
    first.model.half().save_pretrained(tmp_path / "folder")
    second = load_detector(tmp_path / "folder")
    table = key_table(first.model.config)
    exported = to_official(table, second.model.state_dict())
    assert_same_tensors(exported, {k: t.float() for k, t in to_official(table, first.model.state_dict()).items()})
    assert second.architecture == first.architecture


def test_hugging_face_folder_that_does_not_fit(tmp_path: Path) -> None:
    load_sample("swin", tmp_path).model.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    for change, message in [
        ({"num_queries": 21}, "of wrong shape: .*queries_embedder.weight"),
        ({"decoder_layers": 11}, "missing: model.transformer_module.decoder.layers.9"),
        ({"decoder_layers": 9}, "unexpected: model.transformer_module.decoder.layers.8"),
        ({"backbone_config": {"model_type": "resnet"}}, "do not fit|missing"),
        ({"backbone_config": {"model_type": "convnext"}}, "expected ResNetConfig or SwinConfig"),
        ({"common_stride": 8}, "stride|do not fit"),
    ]:
        (tmp_path / "folder/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(WeightsError, match=message):
            load_detector(tmp_path / "folder")


def test_resnets_of_basic_blocks_have_a_table() -> None:
    """The demo's backbone; detectron2 names ResNet-18 like this."""
    backbone = {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 16],
    }
    config = Mask2FormerConfig(backbone_config={**backbone, "depths": [1, 1, 2, 1], "out_indices": [1, 2, 3, 4]})
    table = key_table(config)
    model_keys = {key for row in table for key in row.model}
    state = build_on_meta(config).state_dict()
    assert model_keys == {key for key in state if not any(part in key for part in NOT_OFFICIAL)}
    inferred = infer_config(official_shapes(table, build_on_meta(config)))
    assert inferred.backbone_config.to_dict() == config.backbone_config.to_dict()


def test_coco_names_agree_with_the_category_maps() -> None:
    """Independent source: the COCO-to-VIS tables. A VIS category with a COCO name is mapped from that id."""
    categories = json.loads((GOLDEN / "categories.json").read_text())
    ids = {name: coco_id for coco_id, name in COCO_CATEGORIES.items()}
    checked = 0
    for data_set in ("ytvis_2019", "ytvis_2021", "ovis"):
        mapping = categories[f"coco_to_{data_set}"]
        for category in categories[data_set]:
            name = category["name"].lower().replace("_", " ")
            if name in ids and category["id"] in mapping.values():
                assert mapping[str(ids[name])] == category["id"], name
                checked += 1
    assert checked > 40
    assert len(COCO_CATEGORIES) == 80


def test_heads_must_fit_together(tmp_path: Path) -> None:
    heads = load_sample("r50", tmp_path).prediction_heads()
    assert (heads.hidden_dim, heads.num_classes, heads.feature_dim) == (64, 80, 64)
    assert heads.category_names[17] == "horse"
    expected = official_state("r50")["sem_seg_head.pixel_decoder.mask_features.weight"][:, :, 0, 0]
    assert np.array_equal(heads.arrays["mask_features.weight"], expected.numpy())
    for name, array, message in [
        ("class_embed.bias", np.zeros(80, np.float32), r"class_embed.bias. .*got float32 \(80,\)"),
        ("mask_embed.layers.1.weight", np.zeros((64, 64)), "float64"),
        ("decoder_norm.weight", np.zeros((64, 1), np.float32), "decoder_norm.weight"),
        ("surplus", np.zeros(1, np.float32), "unexpected .*surplus"),
    ]:
        with pytest.raises(WeightsError, match=message):
            DetectorHeads(arrays={**heads.arrays, name: array}, category_names=())
    with pytest.raises(WeightsError, match=r"category names .*expected 80, got 1"):
        replace(heads, category_names=("one",))


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []
