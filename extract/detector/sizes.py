"""How large a detector is, from the shapes of its official tensors; nothing is allocated for the official models."""

from __future__ import annotations

import math
from pathlib import Path

from cache.errors import WeightsError
from extract.detector.architectures import Shapes, official_config
from extract.detector.checkpoints import read_official_checkpoint
from extract.detector.key_table import key_table
from extract.detector.loading import build_on_meta, load_model, official_shapes, quiet_transformers


def shapes_of_architecture(architecture: str, num_classes: int) -> Shapes:
    """Official key -> shape of r50, r101 or swin-l, built on the meta device."""
    config = official_config(architecture, num_classes=num_classes)
    with quiet_transformers():
        return official_shapes(key_table(config), build_on_meta(config))


def shapes_of_weights(weights: Path) -> Shapes:
    """Official key -> shape of the detector in a weight file or folder; WeightsError as in `load_detector`."""
    if weights.is_dir():
        model = load_model(weights, architecture=None).model
        return official_shapes(key_table(model.config), model)
    return {key: tuple(tensor.shape) for key, tensor in read_official_checkpoint(weights).tensors.items()}


def count_parameters(shapes: Shapes) -> dict[str, int]:
    """Parameters of backbone, pixel decoder and predictor; the ResNets' frozen batch norms are none."""
    parts = {"backbone": 0, "sem_seg_head.pixel_decoder": 0, "sem_seg_head.predictor": 0}
    for key, shape in shapes.items():
        if f"{key.rpartition('.')[0]}.running_mean" in shapes:
            continue
        part = next((part for part in parts if key.startswith(f"{part}.")), None)
        if part is None:
            raise WeightsError(f"{key} belongs to no part of a Mask2Former", expected=", ".join(parts))
        parts[part] += math.prod(shape)
    return {part.rpartition(".")[2]: count for part, count in parts.items()}
