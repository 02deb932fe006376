"""The frozen detector of stage one: frames in, frame queries and the FPN map out.

Shape legend: B images, H W pixels (or the stride-4 map), Q frame queries, C query channels, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerModel

from cache.errors import ConfigError, FrameError, WeightsError
from cache.heads import HEAD_SHAPES, DetectorHeads
from extract.detector.architectures import describe_backbone
from extract.detector.checkpoints import LoadReport
from extract.detector.key_table import PIXEL_DECODER, PREDICTOR, key_table, to_official
from extract.detector.loading import load_model

PIXEL_MEAN = (123.675, 116.280, 103.530)
PIXEL_STD = (58.395, 57.120, 57.375)
"""RGB, in 0..255: ImageNet's, as in Mask2Former's configuration files (MODEL.PIXEL_MEAN, PIXEL_STD)."""

PADDING_DIVISOR = 32
PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class FrameFeatures:
    """What the head needs of every frame, on the detector's device.

    frame_queries_BLQC: float32, outputs of the last L decoder layers before `decoder_norm`, oldest first.
    mask_features_BCHW: float32, the last FPN map (stride 4 of the padded canvas, after ReLU), before the
        detector's own 1x1 `mask_features` convolution: VITA's tap.
    """

    frame_queries_BLQC: Tensor
    mask_features_BCHW: Tensor


class FrameDetector(Protocol):
    """A frozen image detector that extraction can run; engines differ, features do not.

    device: where `features` computes. architecture: what, beside the weights, decides the features; part of the
    cache's fingerprint. num_layers: L, how many of the last decoder layers `features` returns.
    precision: what the forward pass really uses. pixel_mean, pixel_std: RGB, in 0..255, applied by `features`.
    category_names: of the classes, in order, or empty. report: how the weights were matched, if they were loaded.
    """

    device: torch.device
    architecture: str
    num_layers: int
    precision: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    category_names: tuple[str, ...]
    report: LoadReport | None

    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        """Features of RGB images of one size, values 0..255, already resized by the caller."""

    def prediction_heads(self) -> DetectorHeads:
        """The frozen heads that turn the features into the detector's own predictions."""


class TransformersDetector:
    """Stock `transformers` Mask2Former as a frozen `FrameDetector`.

    model: ResNet or Swin backbone; moved to the device, switched to eval (its batch norms are real ones) and
        stripped of gradients.
    num_layers: 1 .. number of decoder layers.
    precision: one of `PRECISIONS`; below float32 means autocast, on CUDA only. Elsewhere float32 is used;
        `self.precision` says which.
    category_names: names of the classes, or empty. report: how the weights were matched, if they were loaded.
    Raises ConfigError for an impossible `num_layers` or `precision`, WeightsError where the FPN map is not of
    stride 4.
    """

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        *,
        num_layers: int = 3,
        precision: str = "float32",
        device: torch.device | str = "cpu",
        category_names: tuple[str, ...] = (),
        report: LoadReport | None = None,
    ) -> None:
        require_possible(num_layers, model.config.decoder_layers - 1, precision)
        if model.config.common_stride != 4:
            raise WeightsError("FPN map of another stride", expected=4, got=model.config.common_stride)
        self.device = torch.device(device)
        self.precision = precision if self.device.type == "cuda" else "float32"
        module: nn.Module = model  # the library's own `to` and `eval` carry no types
        module.to(self.device).eval().requires_grad_(False)
        self.model = model
        self.pixel_mean: tuple[float, ...] = PIXEL_MEAN
        self.pixel_std: tuple[float, ...] = PIXEL_STD
        self.architecture = describe_backbone(model.config)
        self.num_layers, self.category_names, self.report = num_layers, category_names, report

    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        """Normalise, zero-pad and run the detector.

        images_BCHW: (B, 3, H, W) RGB, uint8 or float, values 0..255, any device.
        Raises FrameError on another shape.
        """
        images_BCHW = require_frame_batch(images_BCHW).to(self.device).float()  # in this order: a quarter of the bytes
        return self.features_of_canvas(normalise_and_pad(images_BCHW))

    @torch.no_grad()
    def features_of_canvas(self, canvas_BCHW: Tensor) -> FrameFeatures:
        """Features of normalised float32 images on a canvas whose sides are multiples of 32."""
        return detector_forward(
            self.model.model,
            canvas_BCHW,
            num_layers=self.num_layers,
            autocast_dtype=PRECISIONS[self.precision],
        )

    def prediction_heads(self) -> DetectorHeads:
        """The frozen heads as float32 numpy arrays under their official names."""
        return official_heads(to_official(key_table(self.model.config), self.model.state_dict()), self.category_names)


def require_possible(num_layers: int, num_decoder_layers: int, precision: str) -> None:
    """Raise ConfigError for a number of cached layers that a detector has not, or a precision that none has."""
    if not 1 <= num_layers <= num_decoder_layers:
        raise ConfigError(
            "impossible number of cached decoder layers", expected=f"1 to {num_decoder_layers}", got=num_layers
        )
    if precision not in PRECISIONS:
        raise ConfigError("unknown precision", expected=f"one of {', '.join(PRECISIONS)}", got=precision)


def official_heads(state: Mapping[str, Tensor], category_names: tuple[str, ...]) -> DetectorHeads:
    """The prediction heads among a detector's tensors under their official names."""
    arrays = {}
    for name, symbols in HEAD_SHAPES.items():
        owner = PIXEL_DECODER if name.startswith("mask_features.") else PREDICTOR
        tensor = state[f"{owner}.{name}"].float()
        arrays[name] = tensor.reshape(tensor.shape[: len(symbols)]).cpu().numpy()
    return DetectorHeads(arrays=arrays, category_names=category_names)


def require_frame_batch(images_BCHW: Tensor) -> Tensor:
    """Return the images, or raise FrameError where they are not (B, 3, H, W)."""
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise FrameError("not a batch of RGB images", expected="(B, 3, H, W)", got=tuple(images_BCHW.shape))
    return images_BCHW


def normalise_and_pad(
    images_BCHW: Tensor, mean: tuple[float, ...] = PIXEL_MEAN, std: tuple[float, ...] = PIXEL_STD
) -> Tensor:
    """(x - mean) / std per channel, then zeros at the bottom and right up to multiples of 32 (in this order).

    images_BCHW: float32 RGB in 0..255. The padding is zero after normalising, as in Mask2Former.
    """
    mean_C11 = images_BCHW.new_tensor(mean).view(3, 1, 1)
    std_C11 = images_BCHW.new_tensor(std).view(3, 1, 1)
    height, width = images_BCHW.shape[-2:]
    padding = (0, -width % PADDING_DIVISOR, 0, -height % PADDING_DIVISOR)
    return functional.pad((images_BCHW - mean_C11) / std_C11, padding)


def detector_forward(
    model: Mask2FormerModel, canvas_BCHW: Tensor, *, num_layers: int, autocast_dtype: torch.dtype
) -> FrameFeatures:
    """Backbone, pixel decoder and query decoder of the stock model, without its losses and final heads.

    With autocast, the pixel decoder still runs in float32, as in the original. Gradients flow where the
    caller allows them.
    """

    def autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
        return torch.autocast(canvas_BCHW.device.type, dtype=dtype, enabled=dtype != torch.float32)

    fpn_maps: list[Tensor] = []
    pixel_decoder = model.pixel_level_module.decoder
    hook = pixel_decoder.mask_projection.register_forward_pre_hook(lambda _module, inputs: fpn_maps.append(inputs[0]))
    try:
        with autocast(autocast_dtype):
            backbone_maps = model.pixel_level_module.encoder(canvas_BCHW).feature_maps
        with autocast(torch.float32):
            pixels = pixel_decoder([feature_map.float() for feature_map in backbone_maps])
        with autocast(autocast_dtype):
            queries = model.transformer_module(
                multi_scale_features=pixels.multi_scale_features,
                mask_features=pixels.mask_features,
                output_hidden_states=True,
            )
    finally:
        hook.remove()
    # hidden_states: the learnable queries, then the output of every layer, each (Q, B, C) and not yet normed
    frame_queries_LQBC = torch.stack(queries.hidden_states[-num_layers:])
    return FrameFeatures(
        frame_queries_BLQC=frame_queries_LQBC.permute(2, 0, 1, 3).float().contiguous(),
        mask_features_BCHW=fpn_maps[0].float(),
    )


def load_detector(
    weights: Path,
    *,
    architecture: str | None = None,
    num_layers: int = 3,
    precision: str = "float32",
    device: torch.device | str = "cpu",
) -> TransformersDetector:
    """Load a frozen detector from the files that users have.

    weights: a Hugging Face folder (config.json + *.safetensors), an official `.pkl`, or a `.pth`
        (`{"model": ...}`), which may be a full VITA checkpoint.
    architecture: None reads everything from the files; r50, r101 or swin-l also checks the backbone.
    The rest as in `TransformersDetector`; `.report` of the result tells what was matched. Category names are
    those of config.json; COCO's for an official file with 80 classes; else none.
    Raises WeightsError when the weights are unreadable or unsafe, or when a tensor is missing, unexpected or
    of the wrong shape; ConfigError for impossible settings.
    """
    loaded = load_model(weights, architecture=architecture)
    return TransformersDetector(
        loaded.model,
        num_layers=num_layers,
        precision=precision,
        device=device,
        category_names=loaded.category_names,
        report=loaded.report,
    )
