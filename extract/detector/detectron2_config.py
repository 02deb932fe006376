"""A detectron2 config file, read with the code base that it was written for; what it says about the features."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from yaml import YAMLError

from cache.errors import ConfigError
from extract.detector.coco_names import COCO_CATEGORIES
from extract.detector.frozen import PADDING_DIVISOR

_OPERATOR = "MultiScaleDeformableAttention"


def read_config(config_file: Path, device: torch.device) -> Any:
    """Read a config file with everything that detectron2 and the code base add to it; frozen.

    Raises ConfigError where one of them cannot be imported, where the file cannot be read, or where it asks for
    something that a cache cannot hold.
    """
    if not config_file.is_file():
        raise ConfigError("no such detectron2 config file", where=config_file, hint="check detector.config_file")
    _require("detectron2", hint="`make detectron2` installs it")
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    config = get_cfg()
    add_deeplab_config(config)
    mask2former = _import_code_base("mask2former", device)
    mask2former.add_maskformer2_config(config)
    # VITA's copy of Mask2Former reads VITA's settings also where only a detector is built
    if (Path(mask2former.__file__).parents[1] / "vita").is_dir():
        _import_code_base("vita", device).add_vita_config(config)
    try:
        config.merge_from_file(str(config_file), allow_unsafe=False)
    except (KeyError, AssertionError, OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"detectron2 cannot read it: {reason}", where=config_file) from error
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


def describe_model(config: Any, backbone: str) -> str:
    """Name a model by its content: backbone, meta-architecture, and a digest of every model setting."""
    settings = config.MODEL.clone()
    settings.defrost()
    settings.WEIGHTS = settings.DEVICE = ""  # a path and a place, not content
    digest = hashlib.sha256(settings.dump().encode()).hexdigest()
    return f"{backbone}, detectron2 {config.MODEL.META_ARCHITECTURE} {digest[:12]}"


def pixel_statistics(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and standard deviation in the order R, G, B."""
    order = -1 if config.INPUT.FORMAT == "BGR" else 1
    mean, std = tuple(config.MODEL.PIXEL_MEAN[::order]), tuple(config.MODEL.PIXEL_STD[::order])
    return tuple(float(value) for value in mean), tuple(float(value) for value in std)


def category_names(config: Any) -> tuple[str, ...]:
    """Names that the code base has registered for the training set, COCO's for 80 classes, or none."""
    from detectron2.data import MetadataCatalog

    num_classes = config.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for dataset in config.DATASETS.TRAIN:
        names = MetadataCatalog.get(dataset).get("thing_classes", [])
        if len(names) == num_classes:
            return tuple(names)
    return tuple(COCO_CATEGORIES.values()) if num_classes == len(COCO_CATEGORIES) else ()
