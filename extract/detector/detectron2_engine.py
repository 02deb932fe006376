"""The detectron2 engine: the user's own config file and weights, run by detectron2 and the user's code base.

For models that the stock `transformers` Mask2Former cannot express, and for exactness. detectron2 comes from
`make detectron2`; Mask2Former or VITA have no package and are found through PYTHONPATH. Nothing of them is
imported before an engine is built.

Shape legend: B images, H W pixels (or the stride-4 map), Q frame queries, C query channels, L decoder layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache.errors import ConfigError, WeightsError
from cache.heads import DetectorHeads
from extract.detector.architectures import backbone_name
from extract.detector.checkpoints import LoadReport, is_detector_weight, read_official_checkpoint
from extract.detector.detectron2_config import category_names, describe_model, pixel_statistics, read_config
from extract.detector.frozen import (
    PRECISIONS,
    FrameFeatures,
    normalise_and_pad,
    official_heads,
    require_frame_batch,
    require_possible,
)
from extract.detector.loading import check_shapes


class Detectron2Detector:
    """A Mask2Former built by detectron2 from a config file, as a frozen `FrameDetector`.

    model: a built meta-architecture with `backbone` and `sem_seg_head`, in eval mode. config: its CfgNode.
    The rest as in `extract.detector.frozen.TransformersDetector`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        *,
        architecture: str,
        num_layers: int,
        precision: str,
        device: torch.device | str,
        report: LoadReport | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision if self.device.type == "cuda" else "float32"
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        self.architecture, self.num_layers, self.report = architecture, num_layers, report
        self.pixel_mean, self.pixel_std = pixel_statistics(config)
        self.category_names = category_names(config)
        self._flip_channels = config.INPUT.FORMAT == "BGR"

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> FrameFeatures:
        """Normalise, zero-pad and run the detector. images_BCHW: as in `TransformersDetector.features`."""
        images_BCHW = require_frame_batch(images_BCHW).to(self.device, torch.float32)
        canvas_BCHW = normalise_and_pad(images_BCHW, self.pixel_mean, self.pixel_std)
        if self._flip_channels:
            canvas_BCHW = canvas_BCHW.flip(1)
        head = self.model.sem_seg_head
        maps: list[Tensor] = []
        queries: list[Tensor] = []  # the learnable ones, then every layer's, each (Q, B, C) and not yet normed
        hooks = (
            head.pixel_decoder.mask_features.register_forward_pre_hook(lambda _module, inputs: maps.append(inputs[0])),
            head.predictor.decoder_norm.register_forward_pre_hook(lambda _module, inputs: queries.append(inputs[0])),
        )
        dtype = PRECISIONS[self.precision]
        try:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                head(self.model.backbone(canvas_BCHW))
        finally:
            for hook in hooks:
                hook.remove()
        return FrameFeatures(
            frame_queries_BLQC=torch.stack(queries[-self.num_layers :]).permute(2, 0, 1, 3).float().contiguous(),
            mask_features_BCHW=maps[0].float(),
        )

    def prediction_heads(self) -> DetectorHeads:
        """The frozen heads as float32 numpy arrays under their official names."""
        return official_heads(self.model.state_dict(), self.category_names)


def load_detectron2_detector(
    weights: Path,
    config_file: Path,
    *,
    num_layers: int = 3,
    precision: str = "float32",
    device: torch.device | str = "cpu",
) -> Detectron2Detector:
    """Build a frozen detector from a detectron2 config file and an official `.pkl` or `.pth`.

    Raises ConfigError where detectron2 or the code base cannot be imported, where the config file cannot be
    read, or where it asks for something that a cache cannot hold; WeightsError where a tensor is missing,
    unexpected or of the wrong shape.
    """
    config = read_config(config_file, torch.device(device))
    require_possible(num_layers, config.MODEL.MASK_FORMER.DEC_LAYERS - 1, precision)
    model = _build(config, config_file)
    report = _load_weights(model, weights, config)
    return Detectron2Detector(
        model,
        config,
        architecture=describe_model(config, report.backbone),
        num_layers=num_layers,
        precision=precision,
        device=device,
        report=report,
    )


def _build(config: Any, config_file: Path) -> nn.Module:
    from detectron2.modeling import build_model

    try:
        model: nn.Module = build_model(config)
    except KeyError as error:  # detectron2's registries: a name that no imported module has registered
        raise ConfigError(
            f"unknown to detectron2 and the code base: {error}",
            where=config_file,
            hint="which code base is the model from? its folder has to come first in PYTHONPATH",
        ) from error
    return model


def _load_weights(model: nn.Module, weights: Path, config: Any) -> LoadReport:
    """Fill the model's own state dict, so that its format version is known (upstream's loader loses tensors).

    The head of a full VITA model keeps what it was built with: it is not used here.
    """
    if weights.is_dir():
        raise WeightsError(
            "a folder, but detector.engine=detectron2 reads official files", where=weights, expected=".pkl or .pth"
        )
    checkpoint = read_official_checkpoint(weights)
    state = model.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in state.items() if is_detector_weight(key)}
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()}
    check_shapes(weights, expected=expected, got=shapes)
    state.update(checkpoint.tensors)
    model.load_state_dict(state)
    return LoadReport(
        source=weights,
        backbone=backbone_name(shapes) or str(config.MODEL.BACKBONE.NAME),
        matched=len(shapes),
        head_keys=checkpoint.head_keys,
        ignored_keys=checkpoint.ignored_keys,
        renamed=checkpoint.renamed,
    )
