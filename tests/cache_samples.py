"""Tiny caches for the tests: random features of a detector that does not exist."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec, codec_identity
from cache.codecs.fit import StatisticsAccumulator
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.logit import Logit
from cache.codecs.spectral import Spectral
from cache.fingerprint import Fingerprint
from cache.heads import HEAD_SHAPES, DetectorHeads
from cache.layout import VideoAttributes
from cache.reader import FeatureCache
from cache.writer import CacheWriter

NUM_LAYERS, NUM_QUERIES, NUM_CHANNELS = 3, 4, 6
IMAGE_HW, PADDED_HW = (24, 40), (32, 64)
MAP_HW, STORED_MAP_HW = (8, 16), (7, 11)
SIZES = {"C": NUM_CHANNELS, "E": 5, "F": NUM_CHANNELS, "K+1": 3}

FINGERPRINT = Fingerprint(
    weights_sha256="ab" * 32,
    architecture="tiny",
    num_layers=NUM_LAYERS,
    short_edge=24,
    pixel_mean=(123.675, 116.28, 103.53),
    pixel_std=(58.395, 57.12, 57.375),
    padding_divisor=32,
    precision="float32",
)


def random_features(
    num_frames: int, seed: int = 0, num_channels: int = NUM_CHANNELS
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(T, L, Q, C) queries and (T, C, H, W) padded maps."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((num_frames, NUM_LAYERS, NUM_QUERIES, num_channels), dtype=np.float32)
    return queries, rng.standard_normal((num_frames, num_channels, *MAP_HW), dtype=np.float32)


def attributes_of(num_frames: int) -> VideoAttributes:
    return VideoAttributes(num_frames=num_frames, image_hw=IMAGE_HW, padded_hw=PADDED_HW, original_hw=(48, 80))


def random_heads() -> DetectorHeads:
    rng = np.random.default_rng(1)
    shapes = {name: tuple(SIZES[symbol] for symbol in symbols) for name, symbols in HEAD_SHAPES.items()}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return DetectorHeads(arrays=arrays, category_names=("circle", "étoile"))


def labels_of(lengths: dict[int, int], prefix: str = "") -> bytes:
    """A YTVIS label file without objects; `prefix` changes the frames' names."""
    videos = [
        {
            "id": video_id,
            "height": 48,
            "width": 80,
            "length": length,
            "file_names": [f"{prefix}{video_id}/{frame:05}.jpg" for frame in range(length)],
        }
        for video_id, length in lengths.items()
    ]
    return json.dumps({"videos": videos, "annotations": [], "categories": []}).encode()


def fitted_codec(name: str) -> Codec:
    """Fitted to random_features."""
    if name == "float16":
        return Float16()
    accumulator = StatisticsAccumulator(NUM_CHANNELS)
    rng = np.random.default_rng(3)
    accumulator.add(random_features(8)[1], rng.standard_normal((30, NUM_CHANNELS)) * [9, 9, 1, 1, 0.1, 0.1])
    found = accumulator.statistics()
    if name == "int8":
        return Int8.fit(found)
    return {"logit": Logit, "spectral": Spectral}[name].fit(found, relative_step=1 / 40, identity_share=0.01)


def open_writer(
    path: Path, labels: bytes | None = None, fingerprint: Fingerprint = FINGERPRINT, codec: Codec | None = None
) -> CacheWriter:
    codec = codec or Float16()
    fingerprint = replace(fingerprint, codec=codec_identity(codec))
    return CacheWriter.open(path, fingerprint=fingerprint, heads=random_heads(), codec=codec, labels_json=labels)


def write_video(writer: CacheWriter, name: str, num_frames: int, *, seed: int = 0, step: int = 10) -> None:
    """Write random features, `step` frames at a time."""
    queries, maps = random_features(num_frames, seed)
    with writer.video(name, attributes_of(num_frames)) as sink:
        for start in range(0, num_frames, step):
            sink.append(queries[start : start + step], maps[start : start + step])


def files_below(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """The content of every file whose path below the folder fits the pattern."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob(pattern) if file.is_file()}


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


VIDEOS = {"1": 70, "2": 5}
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def write_all_pending(path: Path) -> None:
    writer = open_writer(path)
    for name in writer.pending(VIDEOS):
        write_video(writer, name, VIDEOS[name], seed=int(name))


def write_until_killed(path: Path, fatal_event: int) -> None:
    """Write all videos, but SIGKILL this process at its n-th operation on a file of the cache."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(path)):
            count += 1
            if count == fatal_event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write_all_pending(path)


def read_in_worker(feature_cache: FeatureCache) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    video = feature_cache.video("1")
    return video.frame_queries([3, 1]), video.mask_features([66])
