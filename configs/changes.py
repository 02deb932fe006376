"""What a config changes: settings by dotted name, and those that differ from the defaults."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from configs.schema import Settings

WITHOUT_EFFECT = (
    *("device", "runs", "extract", "data.root", "detector.batch_frames"),
    *("cache.path", "cache.preload", "cache.stage_to", "cache.ignore_space", "cache.codec_from"),
    *("train.workers", "train.accumulate", "train.log_every", "train.checkpoint_every", "train.evaluate_every"),
    *("train.time_budget", "evaluate.chunk_frames", "evaluate.report_videos"),
)
"""Settings, and groups of them, that say where and at which pace something runs, not what comes out."""


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether a setting is one of these or in one of these groups."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


@cache
def default_settings() -> DictConfig:
    """All settings with their types, as they are without a config; not to be changed."""
    settings: DictConfig = OmegaConf.structured(Settings)
    return settings


def flat(settings: Settings | DictConfig) -> dict[str, Any]:
    """Plain values by dotted name, of settings or of what a run has stored."""
    node = settings if isinstance(settings, DictConfig) else OmegaConf.structured(settings)
    return _leaves(OmegaConf.to_container(node, enum_to_str=True))


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(_leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return leaves


def changed_settings(settings: Settings) -> dict[str, Any]:
    """Settings that are not the default."""
    defaults = flat(default_settings())
    return {key: value for key, value in flat(settings).items() if value != defaults[key]}


def in_words(settings: Settings) -> str:
    """The same as one line of `key=value`, which a command line understands."""
    return " ".join(shlex.quote(f"{key}={in_yaml(value)}") for key, value in changed_settings(settings).items())


def in_yaml(value: Any) -> str:
    """A value as YAML in one line: words that can only be words as they are, all else as JSON."""
    if isinstance(value, str):
        with suppress(YAMLError):
            if OmegaConf.from_dotlist([f"value={value}"]).value == value:
                return value
    return json.dumps(value, ensure_ascii=False)
