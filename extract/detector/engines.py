"""Which engine runs the detector that a config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cache.allocation import keep_freed_memory
from configs.command import device_name, precision_name
from configs.schema import DetectorEngine, DetectorSettings, Settings
from extract.detector.frozen import FrameDetector, load_detector


def configured_detector(settings: Settings) -> FrameDetector:
    """Load the frozen detector of a config on its device; errors as below, ConfigError where the device is missing."""
    device = device_name(settings.device)
    precision = precision_name(settings.detector.precision, device)
    return open_detector(settings.detector, precision=precision, device=device)


def open_detector(chosen: DetectorSettings, *, precision: str, device: str) -> FrameDetector:
    """Load the frozen detector of a config with its engine; errors are those of the engine's loader.

    On a CPU, this process keeps freed memory from then on.
    """
    if device == "cpu":
        keep_freed_memory(however_large=True)
    return _ENGINES[chosen.engine](chosen, precision, device)


def _transformers(chosen: DetectorSettings, precision: str, device: str) -> FrameDetector:
    return load_detector(
        Path(chosen.weights),
        architecture=chosen.architecture,
        num_layers=chosen.num_layers,
        precision=precision,
        device=device,
    )


def _detectron2(chosen: DetectorSettings, precision: str, device: str) -> FrameDetector:
    from extract.detector.architectures import require_backbone
    from extract.detector.detectron2_engine import load_detectron2_detector

    assert chosen.config_file is not None  # configs/load.py
    detector = load_detectron2_detector(
        Path(chosen.weights),
        Path(chosen.config_file),
        num_layers=chosen.num_layers,
        precision=precision,
        device=device,
    )
    assert detector.report is not None
    backbone = detector.report.backbone
    require_backbone(chosen.architecture, backbone, chosen.weights)
    return detector


_ENGINES: Mapping[DetectorEngine, Callable[[DetectorSettings, str, str], FrameDetector]] = {
    DetectorEngine.transformers: _transformers,
    DetectorEngine.detectron2: _detectron2,
}
