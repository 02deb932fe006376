"""Read detector weight files as users have them. They come from the internet: none of them may run code.

Official `.pkl` (model zoo: numpy arrays) and `.pth` (training: tensors) files both hold
`{"model": {key: value}}`. A full VITA checkpoint is a `.pth` with the detector's keys and the head's
(`vita_module.*`) side by side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache.archives import require_sound_archive
from cache.errors import WeightsError, first_line, some
from cache.fingerprint import HEAD_FINGERPRINT, sha256_file
from extract.detector.safe_pickle import load_plain_pickle

_HEAD_PREFIX = "vita_module."
# Not weights: the training loss's class weights, tables that follow from the window size, counters
_IGNORED = re.compile(r"(vita_)?criterion\.empty_weight|.*\.relative_position_index|.*\.num_batches_tracked")
_OLD_NAMES = {"sem_seg_head.predictor.static_query.weight": "sem_seg_head.predictor.query_feat.weight"}


@dataclass(frozen=True, kw_only=True)
class OfficialCheckpoint:
    """A weight file with official names, sorted into what belongs to whom.

    tensors: the detector's, old names replaced. head_keys: `vita_module.*`, left to the head's importer.
    ignored_keys: known not to be weights. renamed: (old, new) names.
    """

    tensors: Mapping[str, Tensor]
    head_keys: tuple[str, ...]
    ignored_keys: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every key of a weight file. A report exists only where all of the detector was matched.

    backbone: r50, r101, swin-l, or kind and sizes. matched: tensors loaded. Rest as in `OfficialCheckpoint`.
    """

    source: Path
    backbone: str
    matched: int
    head_keys: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.backbone} detector, {self.matched} tensors matched, 0 unmatched"]
        if self.head_keys:
            parts.append(f"{len(self.head_keys)} belong to a VITA head")
        if self.ignored_keys:
            parts.append(f"{len(self.ignored_keys)} are not weights ({some(self.ignored_keys, 2)})")
        parts.extend(f"{old} read as {new}" for old, new in self.renamed)
        return "; ".join(parts)


def read_official_checkpoint(path: Path) -> OfficialCheckpoint:
    """Read an official `.pkl` or `.pth` file (Mask2Former's model zoo, or VITA's).

    Raises WeightsError when it is missing, truncated, unsafe, or not of the form {"model": {key: tensor}}.
    """
    model = read_model(path)
    head_keys = tuple(key for key in model if key.startswith(_HEAD_PREFIX))
    ignored_keys = tuple(key for key in model if _IGNORED.fullmatch(key))
    renamed = tuple((old, new) for old, new in _OLD_NAMES.items() if old in model and new not in model)
    names = dict(renamed)
    tensors = {names.get(key, key): tensor for key, tensor in model.items() if is_detector_weight(key)}
    return OfficialCheckpoint(tensors=tensors, head_keys=head_keys, ignored_keys=ignored_keys, renamed=renamed)


def is_detector_weight(key: str) -> bool:
    """Whether an official name is a weight of the detector: not the VITA head's, no counter, no derived table."""
    return not key.startswith(_HEAD_PREFIX) and _IGNORED.fullmatch(key) is None


def read_model(path: Path) -> dict[str, Tensor]:
    """Every tensor of an official `.pkl` or `.pth` file under the name it has there; errors as above."""
    return {key: _as_tensor(path, key, value) for key, value in _model_dict(path).items()}


def weight_files(path: Path) -> list[Path]:
    """The files whose bytes decide the weights: the file itself, or a folder's config.json and *.safetensors.

    Raises WeightsError when there are none.
    """
    if path.is_file():
        return [path]
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    if len(files) == 1 or not files[0].is_file():
        hint = "check detector.weights"
        if path.is_dir():
            hint = "pickled pytorch_model.bin files are not read; save the model again as safetensors"
        if (path / HEAD_FINGERPRINT).is_file():
            hint = _run_hint(path)
        raise WeightsError(
            "no detector weights here",
            where=path,
            expected="a .pkl or .pth file, or a folder with config.json and model.safetensors",
            got=("a folder without them" if path.is_dir() else "nothing"),
            hint=hint,
        )
    return files


def weights_sha256(path: Path) -> str:
    """Hash of the content of the weights, never of their path; reads in blocks, so any size is fine.

    One file: its plain SHA-256 in hex. A folder: the SHA-256 over the digests of its files (config.json, then
    weights by name). Raises WeightsError when there are no weights.
    """
    digests = [sha256_file(file) for file in weight_files(path)]
    return digests[0] if path.is_file() else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def _model_dict(path: Path) -> dict[str, object]:
    weight_files(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as stream:
                content = load_plain_pickle(stream)
        else:
            require_sound_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere in its reader
        reason = first_line(error)
        raise WeightsError(
            f"not a readable weight file: {reason}",
            where=path,
            expected="tensors or arrays of numbers, names and plain numbers",
            hint="download it again; files with other Python objects are refused because they could run code",
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(content, dict) and {"head", "fingerprint"} <= content.keys():
        raise WeightsError("the checkpoint of a training run, no detector's", where=path, hint=_run_hint(path.parent))
    if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
        raise WeightsError(
            "not an official checkpoint",
            where=path,
            expected='{"model": {key: tensor}}',
            got=_outline(content),
        )
    return model


def _run_hint(run: Path) -> str:
    """What to name instead of a run of ours."""
    if (run / "detector").is_dir():
        return f"the detector that this run has fine-tuned: detector.weights={run / 'detector'}"
    return f"this run trained a head on a frozen detector: take the detector.weights that {run / 'config.yaml'} names"


def _outline(content: object) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"a dict with keys {', '.join(repr(key) for key in list(content)[:5])}"


def _as_tensor(path: Path, key: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise WeightsError(f"{key} is not an array", where=path, got=type(value).__name__)
    return value
