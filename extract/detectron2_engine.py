"""The detectron2 engine: the user's own config file and weights, run by detectron2 and the user's code base.

For models that the stock `transformers` Mask2Former cannot express, and for exactness. detectron2 comes from
`make detectron2`; Mask2Former or VITA have no package and are found through PYTHONPATH. Nothing of them is
imported before an engine is built.

Shape legend: B images, H W pixels (or the stride-4 map), Q frame queries, C query channels, L decoder layers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cache.errors import ConfigError, WeightsError
from cache.heads import DetectorHeads
from extract.architectures import backbone_name
from extract.checkpoints import LoadReport, is_detector_weight, read_official_checkpoint
from extract.coco_names import COCO_CATEGORIES
from extract.detector import (
    PADDING_DIVISOR,
    PRECISIONS,
    FrameFeatures,
    normalise_and_pad,
    official_heads,
    require_frame_batch,
)
from extract.loading import check_shapes

CODE_BASES = {"Vita": "vita"}
"""Packages that have to be imported for a config's META_ARCHITECTURE, beside `mask2former`."""

_OPERATOR = "MultiScaleDeformableAttention"


class Detectron2Detector:
    """A Mask2Former built by detectron2 from a config file, as a frozen `FrameDetector`.

    model: a built meta-architecture with `backbone` and `sem_seg_head`, in eval mode. config: its CfgNode.
    The rest as in `extract.detector.TransformersDetector`.
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
        self.pixel_mean, self.pixel_std = _pixel_statistics(config)
        self.category_names = _category_names(config)
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
    config = _read_config(config_file, torch.device(device))
    num_decoder_layers = config.MODEL.MASK_FORMER.DEC_LAYERS - 1
    if not 1 <= num_layers <= num_decoder_layers:
        raise ConfigError(
            "impossible number of cached decoder layers", expected=f"1 to {num_decoder_layers}", got=num_layers
        )
    if precision not in PRECISIONS:
        raise ConfigError("unknown precision", expected=f"one of {', '.join(PRECISIONS)}", got=precision)
    model = _build(config, config_file)
    report = _load_weights(model, weights, config)
    return Detectron2Detector(
        model,
        config,
        architecture=_describe(config, report.backbone),
        num_layers=num_layers,
        precision=precision,
        device=device,
        report=report,
    )


def _read_config(config_file: Path, device: torch.device) -> Any:
    if not config_file.is_file():
        raise ConfigError("no such detectron2 config file", where=config_file, hint="check detector.config_file")
    _require("detectron2", hint="`make detectron2` installs it")
    from detectron2.config import CfgNode, get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    try:
        stated = CfgNode.load_yaml_with_base(str(config_file))
        meta_architecture = stated.get("MODEL", {}).get("META_ARCHITECTURE", "MaskFormer")
        config = get_cfg()
        add_deeplab_config(config)
        mask2former = _import_code_base("mask2former", device)
        mask2former.add_maskformer2_config(config)
        if meta_architecture in CODE_BASES:
            _import_code_base(CODE_BASES[meta_architecture], device).add_vita_config(config)
        config.merge_from_other_cfg(stated)
    except (KeyError, AssertionError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"detectron2 cannot read it: {error}", where=config_file) from error
    config.MODEL.DEVICE = device.type
    _require_fitting(config, config_file)
    config.freeze()
    return config


def _require_fitting(config: Any, config_file: Path) -> None:
    """Refuse configs whose features a cache of format 1 could not hold."""
    stride, divisor = config.MODEL.SEM_SEG_HEAD.COMMON_STRIDE, config.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    if stride != 4:
        raise ConfigError("FPN map of another stride", where=config_file, expected=4, got=stride)
    if divisor != PADDING_DIVISOR:
        where = f"{config_file}, MODEL.MASK_FORMER.SIZE_DIVISIBILITY"
        raise ConfigError("images padded otherwise", where=where, expected=PADDING_DIVISOR, got=divisor)


def _require(package: str, *, hint: str) -> None:
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise ConfigError(f"detector.engine=detectron2 needs {package}, which is not installed here", hint=hint)


def _import_code_base(package: str, device: torch.device) -> Any:
    hint = "put a checkout of Mask2Former or VITA on the path: PYTHONPATH=/path/to/checkout make extract ..."
    _require(package, hint=hint)
    _provide_operator(device)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"cannot import {package}: {error}", hint="install what it needs (such as timm)") from error


def _provide_operator(device: torch.device) -> None:
    """Let the code base's own PyTorch function do what its operator, compiled for CUDA only, would do.

    Only where that is missing or the device is not CUDA; the code base imports the operator by this name.
    """
    compiled = _OPERATOR in sys.modules or importlib.util.find_spec(_OPERATOR) is not None
    if not compiled or device.type != "cuda":
        operator: Any = ModuleType(_OPERATOR)
        operator.ms_deform_attn_forward = _deformable_attention
        sys.modules[_OPERATOR] = operator


def _deformable_attention(
    value: Tensor, shapes: Tensor, _starts: Tensor, locations: Tensor, weights: Tensor, _step: int
) -> Tensor:
    functions: Any = importlib.import_module("mask2former.modeling.pixel_decoder.ops.functions.ms_deform_attn_func")
    attended: Tensor = functions.ms_deform_attn_core_pytorch(value, shapes, locations, weights)
    return attended


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


def _describe(config: Any, backbone: str) -> str:
    """Name the model by its content: backbone, meta-architecture, and a digest of every model setting."""
    settings = config.MODEL.clone()
    settings.defrost()
    settings.WEIGHTS = settings.DEVICE = ""  # a path and a place, not content
    digest = hashlib.sha256(settings.dump().encode()).hexdigest()
    return f"{backbone}, detectron2 {config.MODEL.META_ARCHITECTURE} {digest[:12]}"


def _pixel_statistics(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation in the order R, G, B."""
    order = -1 if config.INPUT.FORMAT == "BGR" else 1
    mean, std = tuple(config.MODEL.PIXEL_MEAN[::order]), tuple(config.MODEL.PIXEL_STD[::order])
    return tuple(float(value) for value in mean), tuple(float(value) for value in std)


def _category_names(config: Any) -> tuple[str, ...]:
    """Names that the code base has registered for the training set, COCO's for 80 classes, or none."""
    from detectron2.data import MetadataCatalog

    num_classes = config.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for dataset in config.DATASETS.TRAIN:
        names = MetadataCatalog.get(dataset).get("thing_classes", [])
        if len(names) == num_classes:
            return tuple(names)
    return tuple(COCO_CATEGORIES.values()) if num_classes == len(COCO_CATEGORIES) else ()
