"""How many parameters are trained, and how many are frozen: the head against its detector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cache.labels.annotations import load_labels
from configs.schema import Settings
from configs.splits import train_split
from train_head.build import FeatureSizes, head_config
from train_head.detector_files import DetectorSizes, read_weight_file, sizes_of_architecture, sizes_of_weights
from train_head.heads.contract import HeadConfig
from train_head.heads.kinds import build_head
from train_head.heads.vita import strip_release_prefix
from train_head.release import release_config

OFFICIAL = ("r50", "r101", "swin-l")
DEPTHS: Mapping[str, tuple[int, int]] = {"(release)": (6, 3), "(paper)": (3, 6)}
"""Encoder and decoder layers of the head."""
NUM_COCO_CLASSES = 80

PARTS: Mapping[str, str] = {
    "enc_": "encoder",
    "transformer_": "decoder",
    "vita_mask_features": "mask features",
    "decoder_norm": "decoder norm",
    "query_": "video queries",
    "fq_pos": "frame query positions",
    "input_proj_dec": "input projection",
    "class_embed": "classes",
    "mask_embed": "mask embedding",
    "sim_embed": "similarity",
}
"""Beginning of the released names -> what it is."""


def head_parameters(config: HeadConfig) -> dict[str, int]:
    """Parameters of a head by part (keys of `PARTS`, or the names of modules), built on the meta device."""
    with torch.device("meta"):
        head = build_head(config)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in head.named_parameters():
        part = next((part for part in PARTS if name.startswith(part)), name.partition(".")[0])
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def head_config_for(sizes: DetectorSizes, *, num_classes: int, enc_layers: int, dec_layers: int) -> HeadConfig:
    """VITA's head for a detector."""
    return HeadConfig(
        num_classes=num_classes,
        num_frame_queries=sizes.num_queries,
        detector_dim=sizes.hidden_dim,
        map_dim=sizes.map_dim,
        enc_layers=enc_layers,
        dec_layers=dec_layers,
    )


def official_table(num_classes: int) -> str:
    """The official detectors with the release's head and the paper's, all of `num_classes` categories."""
    lines = [f"{num_classes} categories", f"{'':<9}{'layers':<16}{'detector':>12}{'head':>13}{'ratio':>10}"]
    for name in OFFICIAL:
        sizes = sizes_of_architecture(name, num_classes)
        for words, (enc_layers, dec_layers) in DEPTHS.items():
            config = head_config_for(sizes, num_classes=num_classes, enc_layers=enc_layers, dec_layers=dec_layers)
            head = head_parameters(config)
            totals = f"{sum(sizes.parameters.values()):>12,}{sum(head.values()):>13,}"
            layers = f"{enc_layers}+{dec_layers} {words}"
            lines.append(f"{name:<9}{layers:<16}{totals}{ratio(sizes.parameters, head):>8.1f} %")
    return "\n".join(lines)


def settings_table(settings: Settings, num_classes: int) -> str:
    """The parts of a config's detector and head.

    The detector is measured in its weights, or in the named architecture (of COCO) where they are not here; the
    categories are the label file's, or else `num_classes`.
    """
    detector, labels = settings.detector, train_split(settings).labels
    if detector.architecture is not None and not Path(detector.weights).exists():
        sizes = sizes_of_architecture(detector.architecture, NUM_COCO_CLASSES)
    else:
        sizes = sizes_of_weights(Path(detector.weights))
    if labels.exists():
        num_classes = len(load_labels(labels).categories)
    features = FeatureSizes(
        num_classes=num_classes, num_queries=sizes.num_queries, hidden_dim=sizes.hidden_dim, map_channels=sizes.map_dim
    )
    return parts_table(sizes, head_parameters(head_config(settings, features)), num_classes)


def release_table(source: Path) -> str:
    """The parts of a released VITA checkpoint; raises WeightsError where it holds no head."""
    state = strip_release_prefix(read_weight_file(source))
    config = release_config(state, source, num_heads=1, window=0)
    return parts_table(sizes_of_weights(source), head_parameters(config), config.num_classes)


def parts_table(sizes: DetectorSizes, head: Mapping[str, int], num_classes: int) -> str:
    """Every part of a detector and a head, their totals and ratio."""
    lines = [f"{sizes.num_classes} categories of the detector, {num_classes} of the head"]
    lines += [_line(f"  {name.replace('_', ' ')}", count) for name, count in sizes.parameters.items()]
    lines += [_line("detector (frozen)", sum(sizes.parameters.values()))]
    lines += [_line(f"  {PARTS.get(name, name)}", count) for name, count in head.items() if count]
    lines += [_line("head (trained)", sum(head.values()))]
    return "\n".join([*lines, f"{'head / detector':<26}{ratio(sizes.parameters, head):>11.1f} %"])


def ratio(detector: Mapping[str, int], head: Mapping[str, int]) -> float:
    """The head's parameters in per cent of the detector's."""
    return 100 * sum(head.values()) / sum(detector.values())


def _line(name: str, count: int) -> str:
    return f"{name:<26}{count:>13,}"
