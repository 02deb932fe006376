"""What stage two may ask about detector weight files: for released checkpoints and for the parameter table.

Beside `joint.py`, `data/image_sets.py` and the benchmark the one place that reaches into `extract`, and only when a
verb asks for it: training from a cache and evaluation never do. Reading weight files safely exists once, there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DetectorSizes:
    """Parameters by part, and the sizes that a head has to fit."""

    parameters: Mapping[str, int]
    num_classes: int
    num_queries: int
    hidden_dim: int
    map_dim: int


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of an official `.pkl` or `.pth` file; nothing in it can run code. Raises WeightsError."""
    from extract.detector.checkpoints import read_model  # noqa: TID251 (see above)

    return read_model(path)


def sizes_of_architecture(architecture: str, num_classes: int) -> DetectorSizes:
    """Sizes of r50, r101 or swin-l; nothing is allocated."""
    from extract.detector.sizes import shapes_of_architecture  # noqa: TID251

    return _sizes(shapes_of_architecture(architecture, num_classes))


def sizes_of_weights(weights: Path) -> DetectorSizes:
    """Sizes of the detector in a weight file or folder. Raises WeightsError."""
    from extract.detector.sizes import shapes_of_weights  # noqa: TID251

    return _sizes(shapes_of_weights(weights))


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> DetectorSizes:
    from extract.detector.sizes import count_parameters  # noqa: TID251

    predictor = "sem_seg_head.predictor"
    return DetectorSizes(
        parameters=count_parameters(shapes),
        num_classes=shapes[f"{predictor}.class_embed.bias"][0] - 1,
        num_queries=shapes[f"{predictor}.query_embed.weight"][0],
        hidden_dim=shapes[f"{predictor}.decoder_norm.weight"][0],
        map_dim=shapes["sem_seg_head.pixel_decoder.mask_features.weight"][1],
    )
