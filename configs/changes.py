"""What a config changes: settings by dotted name, and those that differ from the defaults."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from configs.schema import Settings


def flat(settings: Any) -> dict[str, Any]:
    """Plain values by dotted name, of `Settings` or of what a run has stored."""
    node = settings if OmegaConf.is_config(settings) else OmegaConf.structured(settings)
    return _leaves(OmegaConf.to_container(node, enum_to_str=True))


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(_leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return leaves


def changed_settings(settings: Settings) -> dict[str, Any]:
    """Settings that are not the default."""
    defaults = flat(Settings)
    return {key: value for key, value in flat(settings).items() if value != defaults[key]}


def in_words(settings: Settings) -> str:
    """The same as one line of `key=value`, which a command line understands."""
    return " ".join(shlex.quote(f"{key}={_flow(value)}") for key, value in changed_settings(settings).items())


def _flow(value: Any) -> str:
    """A value as YAML in one line: words that can only be words as they are, all else as JSON."""
    if isinstance(value, str):
        with suppress(YAMLError):
            if OmegaConf.from_dotlist([f"value={value}"]).value == value:
                return value
    return json.dumps(value, ensure_ascii=False)
