"""The golden detectors as checkpoint files on disk, for the tests of stage one."""

from __future__ import annotations

import functools
import io
import json
import lzma
import pickle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.detector.frozen import TransformersDetector, load_detector

GOLDEN = Path(__file__).parent / "golden"
FILES = {"r50": "model.pkl", "swin": "model.pth"}


@functools.cache
def checkpoint_bytes(name: str) -> bytes:
    return lzma.decompress((GOLDEN / f"mask2former_tiny_{name}" / f"{FILES[name]}.xz").read_bytes())


def write_checkpoint(name: str, folder: Path) -> Path:
    path = folder / FILES[name]
    path.write_bytes(checkpoint_bytes(name))
    return path


def official_state(name: str) -> dict[str, Tensor]:
    """The golden file's tensors by plain pickle or torch, independently of our readers (it is our own)."""
    if name == "r50":
        model = pickle.loads(checkpoint_bytes(name))["model"]
        return {key: torch.from_numpy(array) for key, array in model.items()}
    return dict(torch.load(io.BytesIO(checkpoint_bytes(name)), weights_only=True)["model"])


def load_sample(name: str, folder: Path, num_layers: int = 3) -> TransformersDetector:
    return load_detector(write_checkpoint(name, folder), num_layers=num_layers)


def golden_arrays(name: str, file: str) -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN / f"mask2former_tiny_{name}" / file) as arrays:
        return dict(arrays)


def key_shapes(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    return {key: tuple(shape) for key, shape in keys.items()}
