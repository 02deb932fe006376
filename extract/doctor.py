"""Is this machine ready for this config? One line a check, green or red, with the remedy."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cache.errors import ConfigError, VitaCacheError
from cache.labels.annotations import load_labels
from cache.reader import FeatureCache
from cache.room import existing_folder, free_bytes
from cache.storage.connection import in_words, object_store, remote_url
from configs.schema import DetectorEngine, Settings
from configs.splits import SplitPaths, all_splits
from extract.detector.loading import load_model
from extract.frames import read_frame, require_frames

LIBRARIES = ("zarr", "numcodecs", "h5py", "scipy", "pycocotools", "transformers", "av", "fastcrc")
PYTHONS = ((3, 11), (3, 13))
SMALL_DISK = 2e9
SMALL_SHARED = 1e9
PROBE_BYTES = 64 * 2**20
GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's result; `remedy` is empty where nothing needs mending."""

    name: str
    message: str
    remedy: str = ""


def doctor(settings: Settings) -> int:
    """Print every check; returns 1 where one is red, else 0."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    reds = 0
    for finding in examine(settings):
        mark, tint = ("FAIL", RED) if finding.remedy else ("ok", GREEN)
        print(f"{tint}{mark:4}{PLAIN}" if colour else f"{mark:4}", f"{finding.name:12} {finding.message}")
        if finding.remedy:
            print(f"     {'':12} remedy: {finding.remedy}")
            reds += 1
    print(f"{reds} to mend" if reds else "all is well")
    return 1 if reds else 0


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check of a config, those of the machine first; no check stops the ones after it."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("pytorch", _pytorch),
        ("gpu", _gpu),
        ("libraries", _libraries),
        ("shared", partial(_shared_memory, Path("/dev/shm"), settings)),
        ("runs", partial(_folder, "runs", Path(settings.runs))),
        ("cache.path", partial(_cache_path, settings)),
    ]
    splits = all_splits(settings)
    checks += [(f"data {split.name}", partial(_data, split)) for split in splits]
    checks.append(("weights", partial(_weights, settings)))
    if remote_url(settings.cache.path) is None:
        checks += [(f"cache {split.name}", partial(_features, split)) for split in splits if split.features.exists()]
    for name, check in checks:
        try:
            yield check()
        except VitaCacheError as error:
            message = str(error).partition("\n")[0]
            yield Finding(name=name, message=message, remedy=error.hint or "see the message")
        except OSError as error:
            yield Finding(
                name=name, message=f"{error.filename}: {error.strerror}", remedy="mend the path or its rights"
            )


def _python() -> Finding:
    version = sys.version_info[:2]
    wrong = not PYTHONS[0] <= version <= PYTHONS[1]
    remedy = "install Python 3.11 to 3.13 and run `make install PYTHON=python3.12`" if wrong else ""
    return Finding(name="python", message=sys.version.split()[0], remedy=remedy)


def _pytorch() -> Finding:
    """Whether torch and torchvision were built for each other: by their metadata, and by running an operator."""
    installed = importlib.metadata.version("torch").partition("+")[0]
    wanted = [word for word in importlib.metadata.requires("torchvision") or () if word.startswith("torch==")]
    message = f"torch {torch.__version__}, torchvision {importlib.metadata.version('torchvision')}"
    remedy = "pip install --upgrade --force-reinstall torch torchvision (from one index: their builds belong together)"
    if wanted and wanted[0] != f"torch=={installed}":
        return Finding(name="pytorch", message=f"{message}, which wants {wanted[0]}", remedy=remedy)
    try:
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        return Finding(name="pytorch", message=f"{message}: {error}".partition("\n")[0], remedy=remedy)
    return Finding(name="pytorch", message=message)


def _gpu() -> Finding:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        return Finding(name="gpu", message=f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if shutil.which("nvidia-smi") is None:
        return Finding(name="gpu", message="none; everything runs on the CPU, slower")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    remedy = "update the NVIDIA driver, or install the torch build for yours (pytorch.org/get-started)"
    return Finding(name="gpu", message=f"nvidia-smi is here, but torch ({build}) sees no device", remedy=remedy)


def _libraries() -> Finding:
    missing = []
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        return Finding(name="libraries", message=f"not importable: {', '.join(missing)}", remedy="make install")
    return Finding(name="libraries", message=f"{len(LIBRARIES)} importable")


def _shared_memory(folder: Path, settings: Settings) -> Finding:
    """Whether the clips that training reads ahead fit: some 50 MB each of float16 features, 12 or more of them."""
    if not folder.is_dir():
        return Finding(name="shared", message=f"no {folder} on this system")
    free = free_bytes(folder)
    small = free < SMALL_SHARED and settings.train.workers != 0
    remedy = "docker run --shm-size=8g (or --ipc=host); clips now go by way of files in the temporary folder"
    return Finding(name="shared", message=f"{free / 1e9:.1f} GB free in {folder}", remedy=remedy if small else "")


def _cache_path(settings: Settings) -> Finding:
    address = remote_url(settings.cache.path)
    return _folder("cache.path", Path(settings.cache.path)) if address is None else _bucket(address)


def _folder(name: str, path: Path) -> Finding:
    """Whether the folder, or the one that will hold it, can be written to, how fast, and how much fits."""
    existing = existing_folder(path)
    probe, free = existing / f".doctor-{uuid.uuid4().hex}", free_bytes(existing)
    if not existing.is_dir():
        return Finding(name=name, message=f"{existing} is not a folder", remedy="name another path")
    started = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(bytes(min(PROBE_BYTES, free // 2)))
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            name=name, message=f"{existing}: {error.strerror}", remedy="mend its rights, or name another path"
        )
    finally:
        probe.unlink(missing_ok=True)
    speed = min(PROBE_BYTES, free // 2) / (time.perf_counter() - started) / 1e6
    message = f"{existing}: {free / 1e9:.1f} GB free, writes {speed:.0f} MB/s"
    return Finding(name=name, message=message, remedy="free some space" if free < SMALL_DISK else "")


def _bucket(address: str) -> Finding:
    """Whether an object can be written, read and deleted below the address. Raises CacheError where not."""
    objects, key = object_store(address), f".doctor-{uuid.uuid4().hex}"
    with in_words(address, "cannot be used"):
        objects.put(key, b"vita-cache")
        objects.get(key).bytes()
        objects.delete(key)
    return Finding(name="cache.path", message=f"{address}: can be written, read and deleted from")


def _data(split: SplitPaths) -> Finding:
    """Whether labels are readable, all frames are there, and a first frame has the labelled size."""
    if not split.labels.is_file():
        hint = "`make demo-data` generates the demo's; else check data.root and data.*_labels"
        raise ConfigError("no such label file", where=split.labels, hint=hint)
    labels = load_labels(split.labels)
    require_frames(labels.videos, split.frames)
    if labels.videos:
        video = labels.videos[0]
        read_frame(split.frames / video.file_names[0], (video.height, video.width))
    frames = sum(video.length for video in labels.videos)
    tracks = f"{len(labels.tracks)} tracks" if labels.has_tracks else "no labels"
    return Finding(name=f"data {split.name}", message=f"{len(labels.videos)} videos, {frames} frames, {tracks}")


def _weights(settings: Settings) -> Finding:
    chosen = settings.detector
    if chosen.engine is DetectorEngine.detectron2:
        from extract.detector.detectron2_config import read_config

        assert chosen.config_file is not None  # configs/load.py
        read_config(Path(chosen.config_file), torch.device("cpu"))
        return Finding(name="weights", message=f"detectron2 reads {chosen.config_file}")
    loaded = load_model(Path(chosen.weights), architecture=chosen.architecture)
    millions = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    return Finding(name="weights", message=f"{chosen.weights}: {loaded.report.backbone}, {millions:.1f} M parameters")


def _features(split: SplitPaths) -> Finding:
    feature_cache = FeatureCache.open(split.features)
    states = [attributes for _, attributes in feature_cache.store.videos()]
    if not all(states):
        message = f"{states.count(None)} of {len(states)} videos are incomplete"
        return Finding(name=f"cache {split.name}", message=message, remedy="run the same `make extract` again")
    return Finding(name=f"cache {split.name}", message=f"{split.features}: {len(states)} videos, complete")
