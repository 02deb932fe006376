"""What command lines with a config share: its settings announced, the choice of device and precision."""

from __future__ import annotations

from collections.abc import Sequence

from cache.errors import ConfigError
from cache.progress import is_main
from configs.changes import in_words
from configs.load import load_settings
from configs.schema import Device, Precision, Settings


def announced_settings(config: str, overrides: Sequence[str]) -> Settings:
    """Load settings and print, as one line, those that are not the default. Raises ConfigError."""
    settings = load_settings(config, overrides)
    if is_main():
        print(f"settings: {in_words(settings)}", flush=True)
    return settings


def device_name(device: Device) -> str:
    """Resolve auto; raises ConfigError when CUDA is asked for and missing."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("CUDA is not available here", where="setting device", hint="use device=auto or device=cpu")
    return "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"


def precision_name(precision: Precision, device: str) -> str:
    """Resolve auto: bfloat16 on CUDA, float32 on CPU."""
    if precision is not Precision.auto:
        return str(precision.value)
    return "bfloat16" if device == "cuda" else "float32"
