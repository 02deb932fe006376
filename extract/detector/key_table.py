"""Official Mask2Former parameter names <-> those of the stock `transformers` model, row by row.

One row per official tensor. Most rows name one model tensor; attention projections which the official
code stacks (`in_proj`, `qkv`) name three, split along the first axis: query, key, value. The table is a
bijection onto the model's parameters and batch-norm statistics: tests/test_detector_weights.py checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, ResNetConfig, SwinConfig

from cache.errors import WeightsError

PIXEL_DECODER = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
_ENCODER = "model.pixel_level_module.encoder"
_DECODER = "model.pixel_level_module.decoder"
_TRANSFORMER = "model.transformer_module"

BackboneConfig = ResNetConfig | SwinConfig

_AFFINE = ("weight", "bias")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class KeyRow:
    """One official tensor and the model tensors whose concatenation along axis 0 it is."""

    official: str
    model: tuple[str, ...]


def backbone_of(config: Mask2FormerConfig) -> BackboneConfig:
    """The backbone's configuration. Raises WeightsError for a backbone that is neither ResNet nor Swin."""
    if not isinstance(config.backbone_config, ResNetConfig | SwinConfig):
        got = type(config.backbone_config).__name__
        raise WeightsError("unsupported detector backbone", expected="ResNetConfig or SwinConfig", got=got)
    return config.backbone_config


def key_table(config: Mask2FormerConfig) -> tuple[KeyRow, ...]:
    """All rows for a model of this configuration (ResNet or Swin backbone)."""
    backbone = backbone_of(config)
    backbone_rows = _swin_rows(backbone) if isinstance(backbone, SwinConfig) else _resnet_rows(backbone)
    return (*backbone_rows, *_pixel_decoder_rows(config), *_predictor_rows(config))


def from_official(table: Sequence[KeyRow], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official state dict to the model's; `state` must hold every official key of the table."""
    converted: dict[str, Tensor] = {}
    for row in table:
        converted.update(zip(row.model, state[row.official].chunk(len(row.model)), strict=True))
    return converted


def to_official(table: Sequence[KeyRow], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict to the official one; keys outside the table are left out."""
    return {row.official: torch.cat([state[name] for name in row.model]) for row in table}


def _rows(official: str, model: str, tensors: Sequence[str] = _AFFINE) -> Iterator[KeyRow]:
    for tensor in tensors:
        yield KeyRow(official=f"{official}.{tensor}", model=(f"{model}.{tensor}",))


def _qkv_rows(official: str, model: str) -> Iterator[KeyRow]:
    for tensor in _AFFINE:
        yield KeyRow(
            official=official + tensor,
            model=tuple(f"{model}.{part}_proj.{tensor}" for part in ("q", "k", "v")),
        )


def _resnet_rows(backbone: ResNetConfig) -> Iterator[KeyRow]:
    yield from _conv_norm_rows("backbone.stem.conv1", f"{_ENCODER}.embedder.embedder")
    num_convs = 3 if backbone.layer_type == "bottleneck" else 2
    widths = list(backbone.hidden_sizes or ())
    in_channels = [backbone.embedding_size, *widths[:-1]]
    for stage, num_blocks in enumerate(backbone.depths or ()):
        strided = stage > 0 or backbone.downsample_in_first_stage
        for block in range(num_blocks):
            official = f"backbone.res{stage + 2}.{block}"
            model = f"{_ENCODER}.encoder.stages.{stage}.layers.{block}"
            if block == 0 and (strided or in_channels[stage] != widths[stage]):
                yield from _conv_norm_rows(f"{official}.shortcut", f"{model}.shortcut")
            for conv in range(num_convs):
                yield from _conv_norm_rows(f"{official}.conv{conv + 1}", f"{model}.layer.{conv}")


def _conv_norm_rows(official: str, model: str) -> Iterator[KeyRow]:
    yield from _rows(official, f"{model}.convolution", ("weight",))
    yield from _rows(f"{official}.norm", f"{model}.normalization", _BATCH_NORM)


def _swin_rows(backbone: SwinConfig) -> Iterator[KeyRow]:
    yield from _rows("backbone.patch_embed.proj", f"{_ENCODER}.swin.embeddings.patch_embeddings.projection")
    yield from _rows("backbone.patch_embed.norm", f"{_ENCODER}.swin.embeddings.norm")
    for stage, num_blocks in enumerate(backbone.depths):
        official = f"backbone.layers.{stage}"
        model = f"{_ENCODER}.swin.encoder.layers.{stage}"
        for block in range(num_blocks):
            yield from _swin_block_rows(f"{official}.blocks.{block}", f"{model}.blocks.{block}")
        if stage < len(backbone.depths) - 1:
            yield from _rows(f"{official}.downsample.reduction", f"{model}.downsample.reduction", ("weight",))
            yield from _rows(f"{official}.downsample.norm", f"{model}.downsample.norm")
        yield from _rows(f"backbone.norm{stage}", f"{_ENCODER}.hidden_states_norms.stage{stage + 1}")


def _swin_block_rows(official: str, model: str) -> Iterator[KeyRow]:
    yield from _rows(f"{official}.norm1", f"{model}.layernorm_before")
    yield from _rows(f"{official}.attn", f"{model}.attention.relative_position_bias", ("relative_position_bias_table",))
    yield from _qkv_rows(f"{official}.attn.qkv.", f"{model}.attention")
    yield from _rows(f"{official}.attn.proj", f"{model}.attention.o_proj")
    yield from _rows(f"{official}.norm2", f"{model}.layernorm_after")
    yield from _rows(f"{official}.mlp.fc1", f"{model}.mlp.fc1")
    yield from _rows(f"{official}.mlp.fc2", f"{model}.mlp.fc2")


def _pixel_decoder_rows(config: Mask2FormerConfig) -> Iterator[KeyRow]:
    for level in range(3):
        for part in range(2):  # 1x1 convolution, group norm
            yield from _rows(
                f"{PIXEL_DECODER}.input_proj.{level}.{part}", f"{_DECODER}.input_projections.{level}.{part}"
            )
    yield from _rows(f"{PIXEL_DECODER}.transformer", _DECODER, ("level_embed",))
    for layer in range(config.encoder_layers):
        official = f"{PIXEL_DECODER}.transformer.encoder.layers.{layer}"
        model = f"{_DECODER}.encoder.layers.{layer}"
        for linear in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            yield from _rows(f"{official}.self_attn.{linear}", f"{model}.self_attn.{linear}")
        yield from _rows(f"{official}.norm1", f"{model}.self_attn_layer_norm")
        yield from _rows(f"{official}.linear1", f"{model}.fc1")
        yield from _rows(f"{official}.linear2", f"{model}.fc2")
        yield from _rows(f"{official}.norm2", f"{model}.final_layer_norm")
    yield from _rows(f"{PIXEL_DECODER}.mask_features", f"{_DECODER}.mask_projection")
    for name in ("adapter_1", "layer_1"):
        yield from _rows(f"{PIXEL_DECODER}.{name}", f"{_DECODER}.{name}.0", ("weight",))
        yield from _rows(f"{PIXEL_DECODER}.{name}.norm", f"{_DECODER}.{name}.1")


def _predictor_rows(config: Mask2FormerConfig) -> Iterator[KeyRow]:
    for layer in range(config.decoder_layers - 1):
        yield from _decoder_layer_rows(layer)
    if config.enforce_input_projection or config.hidden_dim != config.feature_size:
        for level in range(3):
            yield from _rows(f"{PREDICTOR}.input_proj.{level}", f"{_TRANSFORMER}.input_projections.{level}")
    yield from _rows(f"{PREDICTOR}.decoder_norm", f"{_TRANSFORMER}.decoder.layernorm")
    yield from _rows(f"{PREDICTOR}.query_feat", f"{_TRANSFORMER}.queries_features", ("weight",))
    yield from _rows(f"{PREDICTOR}.query_embed", f"{_TRANSFORMER}.queries_embedder", ("weight",))
    yield from _rows(f"{PREDICTOR}.level_embed", f"{_TRANSFORMER}.level_embed", ("weight",))
    yield from _rows(f"{PREDICTOR}.class_embed", "class_predictor")
    for layer in range(3):
        yield from _rows(
            f"{PREDICTOR}.mask_embed.layers.{layer}",
            f"{_TRANSFORMER}.decoder.mask_predictor.mask_embedder.{layer}.0",
        )


def _decoder_layer_rows(layer: int) -> Iterator[KeyRow]:
    model = f"{_TRANSFORMER}.decoder.layers.{layer}"
    self_attention = f"{PREDICTOR}.transformer_self_attention_layers.{layer}"
    yield from _qkv_rows(f"{self_attention}.self_attn.in_proj_", f"{model}.self_attn")
    yield from _rows(f"{self_attention}.self_attn.out_proj", f"{model}.self_attn.out_proj")
    yield from _rows(f"{self_attention}.norm", f"{model}.self_attn_layer_norm")
    cross_attention = f"{PREDICTOR}.transformer_cross_attention_layers.{layer}"
    stacked = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    yield from _rows(f"{cross_attention}.multihead_attn", f"{model}.cross_attn", stacked)
    yield from _rows(f"{cross_attention}.norm", f"{model}.cross_attn_layer_norm")
    feed_forward = f"{PREDICTOR}.transformer_ffn_layers.{layer}"
    yield from _rows(f"{feed_forward}.linear1", f"{model}.fc1")
    yield from _rows(f"{feed_forward}.linear2", f"{model}.fc2")
    yield from _rows(f"{feed_forward}.norm", f"{model}.final_layer_norm")
