"""Weights on disk -> a model: every tensor finds its place, or nothing is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.utils import logging as transformers_logging

from cache.errors import ConfigError, WeightsError, some
from extract.detector.architectures import ARCHITECTURES, Shapes, describe_backbone, infer_config, require_backbone
from extract.detector.checkpoints import LoadReport, read_official_checkpoint, weight_files
from extract.detector.coco_names import COCO_CATEGORIES
from extract.detector.key_table import KeyRow, from_official, key_table


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with all of its weights, float32 on the CPU, and how they were matched.

    category_names: of the classes, in order, or empty where the files do not tell.
    """

    model: Mask2FormerForUniversalSegmentation
    report: LoadReport
    category_names: tuple[str, ...]


def load_model(weights: Path, *, architecture: str | None) -> LoadedModel:
    """Read the weights and find a place for each of them; see `extract.detector.frozen.load_detector`."""
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ConfigError("unknown architecture", expected=f"{', '.join(ARCHITECTURES)} or null", got=architecture)
    with quiet_transformers():
        loaded = _load_folder(weights) if weights.is_dir() else _load_official(weights)
    require_backbone(architecture, loaded.report.backbone, weights)
    return loaded


def build_on_meta(config: Mask2FormerConfig) -> Mask2FormerForUniversalSegmentation:
    """The model without memory or values: names and shapes only."""
    with torch.device("meta"):
        return Mask2FormerForUniversalSegmentation(config)


def official_shapes(table: Sequence[KeyRow], model: Mask2FormerForUniversalSegmentation) -> dict[str, tuple[int, ...]]:
    """The shape every official tensor of the table must have for this model."""
    state = model.state_dict()
    return {
        row.official: (sum(state[name].shape[0] for name in row.model), *state[row.model[0]].shape[1:]) for row in table
    }


def check_shapes(where: Path, *, expected: Shapes, got: Shapes) -> None:
    """Raise WeightsError naming the first missing, unexpected and wrong-shape keys, if there are any."""
    missing = [key for key in expected if key not in got]
    unexpected = [key for key in got if key not in expected]
    wrong = [f"{key} {got[key]}, not {shape}" for key, shape in expected.items() if key in got and got[key] != shape]
    _refuse_partial(where, missing=missing, unexpected=unexpected, wrong_shape=wrong)


def _load_official(path: Path) -> LoadedModel:
    checkpoint = read_official_checkpoint(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()}
    try:
        config = infer_config(shapes)
        table = key_table(config)
        expected = official_shapes(table, build_on_meta(config))
    except ValueError as error:  # a WeightsError without the path, or sizes that transformers refuses
        raise WeightsError(f"not the weights of a Mask2Former: {error}", where=path) from error
    check_shapes(path, expected=expected, got=shapes)
    model, _ = _from_pretrained(None, config=config, state_dict=from_official(table, checkpoint.tensors))
    report = LoadReport(
        source=path,
        backbone=describe_backbone(config),
        matched=len(table),
        head_keys=checkpoint.head_keys,
        ignored_keys=checkpoint.ignored_keys,
        renamed=checkpoint.renamed,
    )
    is_coco = config.num_labels == len(COCO_CATEGORIES)
    return LoadedModel(model=model, report=report, category_names=tuple(COCO_CATEGORIES.values()) if is_coco else ())


def _load_folder(folder: Path) -> LoadedModel:
    weight_files(folder)
    try:
        config = Mask2FormerConfig.from_pretrained(folder, local_files_only=True)
        table = key_table(config)
        model, info = _from_pretrained(folder, config=config)
    except Exception as error:  # damaged config.json or safetensors: every layer below has its own error type
        raise WeightsError(f"not a readable Mask2Former folder: {error}", where=folder) from error
    _refuse_partial(
        folder,
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(key for key in info["unexpected_keys"] if "relative_position_index" not in key),
        wrong_shape=[f"{key} {tuple(got)}, not {tuple(want)}" for key, got, want in sorted(info["mismatched_keys"])],
    )
    return LoadedModel(
        model=model,
        report=LoadReport(source=folder, backbone=describe_backbone(config), matched=len(table)),
        category_names=tuple(name for _, name in sorted((config.id2label or {}).items())),
    )


def _from_pretrained(
    folder: Path | None, *, config: Mask2FormerConfig, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[Mask2FormerForUniversalSegmentation, Mapping[str, Any]]:
    loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder,
        config=config,
        state_dict=state_dict,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # reported in the second result, and refused by us with the others
        output_loading_info=True,
    )
    model, info = loaded
    return model, info


def _refuse_partial(
    where: Path, *, missing: Sequence[str], unexpected: Sequence[str], wrong_shape: Sequence[str]
) -> None:
    problems = {"missing": missing, "unexpected": unexpected, "of wrong shape": wrong_shape}
    found = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise WeightsError(
            "the weights do not fit the model; " + "; ".join(found),
            where=where,
            hint="is this a Mask2Former (instance, multi-scale deformable pixel decoder) checkpoint?",
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's bar, its table of mismatches (we raise instead) and its doubts about ResNet."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
