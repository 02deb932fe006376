"""Model configurations: the official COCO-instance ones by name, any other from the shapes of its weights.

Both give a configuration of the stock `transformers` Mask2Former. Nothing about a model has to be typed by
hand: every size, the depth and width of the backbone, even the number of attention heads shows in the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Mask2FormerConfig, ResNetConfig, SwinConfig

from cache.errors import ConfigError, WeightsError
from extract.detector.key_table import PIXEL_DECODER, PREDICTOR, BackboneConfig, backbone_of

Shapes = Mapping[str, tuple[int, ...]]

ARCHITECTURES = ("r50", "r101", "swin-l")
ALL_STAGES: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_NUM_LEVELS, _NUM_POINTS = 3, 4  # of the deformable attention, fixed in Mask2Former
_SWIN_DROP_PATH = 0.3  # training only; not visible in the shapes


def official_config(name: str, *, num_classes: int = 80) -> Mask2FormerConfig:
    """Configuration of an official COCO-instance model (Mask2Former model zoo).

    name: one of `ARCHITECTURES`; 100 queries for the ResNets, 200 for Swin-L, 9 + 1 decoder layers.
    Raises ConfigError for another name.
    """
    if name not in ARCHITECTURES:
        raise ConfigError("unknown detector architecture", expected=f"one of {', '.join(ARCHITECTURES)}", got=name)
    if name == "swin-l":
        backbone: BackboneConfig = _swin(192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12)
    else:
        backbone = _resnet(64, widths=[256, 512, 1024, 2048], depths=[3, 4, 6 if name == "r50" else 23, 3])
    return Mask2FormerConfig(
        backbone_config=backbone, id2label=_labels(num_classes), num_queries=200 if name == "swin-l" else 100
    )


def require_backbone(wanted: str | None, found: str, weights: Path | str) -> None:
    """Raise WeightsError where a config names an architecture, and the weights are of another."""
    if wanted not in (None, found):
        hint = "detector.architecture=null takes what the weights have; or name other detector.weights"
        raise WeightsError("the weights are of another backbone", where=weights, expected=wanted, got=found, hint=hint)


def infer_config(shapes: Shapes) -> Mask2FormerConfig:
    """Configuration of the model that official weights of these shapes belong to.

    shapes: official key -> shape. Raises WeightsError when a key that tells a size is missing.
    """
    attention_rows = _size(shapes, f"{PIXEL_DECODER}.transformer.encoder.layers.0.self_attn.attention_weights.bias")
    return Mask2FormerConfig(
        backbone_config=infer_backbone(shapes),
        id2label=_labels(_size(shapes, f"{PREDICTOR}.class_embed.bias") - 1),
        num_queries=_size(shapes, f"{PREDICTOR}.query_embed.weight"),
        hidden_dim=_size(shapes, f"{PREDICTOR}.decoder_norm.weight"),
        feature_size=_size(shapes, f"{PIXEL_DECODER}.mask_features.weight", axis=1),
        mask_feature_size=_size(shapes, f"{PIXEL_DECODER}.mask_features.weight"),
        encoder_layers=_count(shapes, f"{PIXEL_DECODER}.transformer.encoder.layers"),
        encoder_feedforward_dim=_size(shapes, f"{PIXEL_DECODER}.transformer.encoder.layers.0.linear1.bias"),
        decoder_layers=_count(shapes, f"{PREDICTOR}.transformer_ffn_layers") + 1,
        dim_feedforward=_size(shapes, f"{PREDICTOR}.transformer_ffn_layers.0.linear1.bias"),
        num_attention_heads=max(1, attention_rows // (_NUM_LEVELS * _NUM_POINTS)),
        enforce_input_projection=f"{PREDICTOR}.input_proj.0.weight" in shapes,
    )


def infer_backbone(shapes: Shapes) -> BackboneConfig:
    """The backbone alone, from official `backbone.*` keys: ResNet (basic or bottleneck blocks) or Swin."""
    if "backbone.patch_embed.proj.weight" in shapes:
        stages = [f"backbone.layers.{stage}" for stage in range(4)]
        tables = [f"{stage}.blocks.0.attn.relative_position_bias_table" for stage in stages]
        # The table has (2 w - 1)^2 rows for a window of w x w.
        window_size = (round(_size(shapes, tables[0]) ** 0.5) + 1) // 2
        return _swin(
            _size(shapes, "backbone.patch_embed.proj.weight"),
            depths=[_count(shapes, f"{stage}.blocks") for stage in stages],
            num_heads=[_size(shapes, table, axis=1) for table in tables],
            window_size=window_size,
        )
    bottleneck = "backbone.res2.0.conv3.weight" in shapes
    stages = [f"backbone.res{stage}" for stage in range(2, 6)]
    return _resnet(
        _size(shapes, "backbone.stem.conv1.weight"),
        widths=[_size(shapes, f"{stage}.0.conv{3 if bottleneck else 2}.weight") for stage in stages],
        depths=[_count(shapes, stage) for stage in stages],
        layer_type="bottleneck" if bottleneck else "basic",
    )


def describe_backbone(config: Mask2FormerConfig) -> str:
    """The official name of a backbone of these sizes, or its kind and sizes where it has none."""
    return _name_of(backbone_of(config))


def backbone_name(shapes: Shapes) -> str | None:
    """The same from official `backbone.*` keys; None where they are neither a ResNet's nor a Swin's."""
    try:
        return _name_of(infer_backbone(shapes))
    except (WeightsError, ValueError):
        return None


def _name_of(backbone: BackboneConfig) -> str:
    sizes = _backbone_sizes(backbone)
    for name in ARCHITECTURES:
        if _backbone_sizes(backbone_of(official_config(name))) == sizes:
            return name
    return " ".join(str(size) for size in sizes)


def _backbone_sizes(backbone: BackboneConfig) -> tuple[object, ...]:
    depths = list(backbone.depths or ())
    if isinstance(backbone, SwinConfig):
        return ("swin", backbone.embed_dim, depths, list(backbone.num_heads), backbone.window_size)
    return ("resnet", backbone.layer_type, list(backbone.hidden_sizes or ()), depths)


def _labels(num_classes: int) -> dict[int, str]:
    return {index: f"class {index}" for index in range(num_classes)}


def _resnet(stem: int, *, widths: list[int], depths: list[int], layer_type: str = "bottleneck") -> ResNetConfig:
    return ResNetConfig(
        embedding_size=stem,
        hidden_sizes=widths,
        depths=depths,
        layer_type=layer_type,
        **ALL_STAGES,
    )


def _swin(embed_dim: int, *, depths: list[int], num_heads: list[int], window_size: int) -> SwinConfig:
    return SwinConfig(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_size,
        drop_path_rate=_SWIN_DROP_PATH,
        **ALL_STAGES,
    )


def _size(shapes: Shapes, key: str, axis: int = 0) -> int:
    shape = shapes.get(key, ())
    if len(shape) <= axis:
        raise WeightsError(
            f"{key} is missing or has no axis {axis}",
            expected="the weights of a Mask2Former with a ResNet or Swin backbone",
        )
    return shape[axis]


def _count(shapes: Shapes, prefix: str) -> int:
    """Number of modules `prefix.0`, `prefix.1`, ... that have weights."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    indices = {int(match[1]) for key in shapes if (match := pattern.match(key))}
    return len(indices)
