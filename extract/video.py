"""Stage one for footage of one's own: video files and images, without labels, into one cache `<cache.path>/video`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache.background import BackgroundWriter
from cache.codecs.float16 import Float16
from cache.errors import ConfigError, WeightsError
from cache.fingerprint import HEAD_FINGERPRINT, Fingerprint, Provenance
from cache.layout import Size, VideoAttributes, video_group_name
from cache.media.footage import RECORD, Footage, look_through, read_record, write_record
from cache.media.geometry import Transform
from cache.progress import StageProgress
from cache.storage.connection import remote_url
from cache.storage.locks import locked
from cache.writer import CacheWriter
from configs.cards import write_cache_card
from configs.load import load_settings
from configs.schema import Decoder, Precision, Settings
from extract.batches import BatchRunner
from extract.decoding import on_tensor
from extract.detector.checkpoints import weights_sha256
from extract.detector.engines import configured_detector
from extract.detector.frozen import FrameDetector
from extract.fingerprint import fingerprint
from extract.jobs import attributes_of
from extract.room import BYTES_OF_FLOAT16, frame_cost, require_features_fit, stored_bytes

FOLDER = "video"
FINE_TUNED = "detector"
"""Where a run that fine-tuned the detector keeps it (train_head/joint.py)."""


def extract_footage(config: str, words: Sequence[str], *, head: Path | None = None, stride: int = 1) -> Path:
    """Run the frozen detector of a config over videos and return the cache that holds their features.

    `words`: paths (see cache.media.footage.look_through) and settings (`key=value`). `head`: folder of the run that
    will read the features, whose detector and precision are taken. A cache that is there is continued: what it holds
    is not extracted again. Raises ConfigError where there is nothing to do, FrameError for what cannot be decoded,
    FingerprintMismatch for a detector other than the head's, CacheError for a disk without room, all before the first
    frame is extracted.
    """
    paths = [Path(word) for word in words if not _is_setting(word)]
    settings, wanted = _settings(config, [word for word in words if _is_setting(word)], head)
    if stride < 1 or not paths:
        expected, got = "at least one file, --stride 1 or more", f"{len(paths)} files, --stride {stride}"
        raise ConfigError("nothing to extract", where="command line", expected=expected, got=got)
    if remote_url(settings.cache.path) is not None:
        hint = "name a folder; `python -m cache upload` takes the result there"
        raise ConfigError("videos of your own go into a folder", where=f"cache.path={settings.cache.path}", hint=hint)
    detector = configured_detector(settings)
    held = fingerprint(settings, detector, weights_sha256(Path(settings.detector.weights)), Float16())
    if wanted is not None:
        hint = "set detector.* to those of the head's own extraction"
        if wanted.precision != held.precision:
            hint = f"features in {wanted.precision} need device=cuda, on a machine that has one"
        replace(wanted, codec=held.codec).require(held, where=head, hint=hint)
    footage = list(dict.fromkeys(piece for path in paths for piece in look_through(path, stride)))
    for piece in footage:
        if piece.problem is not None:
            print(f"warning: {piece.source}: {piece.problem}. The {len(piece.seconds)} frames decoded are used.")
    features = Path(settings.cache.path) / FOLDER
    paths_of = {"weights": settings.detector.weights, "videos": ", ".join(piece.source for piece in footage)}
    writer = CacheWriter.open(
        features,
        fingerprint=held,
        heads=detector.prediction_heads(),
        codec=Float16(),
        labels_json=None,
        provenance=Provenance.gather(paths_of),
    )
    _extract(settings, detector, writer, _recorded(settings, detector, writer, footage))
    return features


def _is_setting(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _settings(config: str, overrides: Sequence[str], head: Path | None) -> tuple[Settings, Fingerprint | None]:
    """The settings, and what the head was trained on where its run tells."""
    settings = load_settings(config, overrides)
    if head is None:
        return settings, None
    if not head.is_dir():
        hint = f"`make train name={head.name}` with its config makes one; without name=, `make train` makes runs/demo"
        raise WeightsError("no trained head here", where=head, hint=hint)
    if (head / FINE_TUNED).is_dir():
        settings.detector.weights = str(head / FINE_TUNED)
    file = head / HEAD_FINGERPRINT
    if not file.exists():
        return settings, None
    wanted = Fingerprint.from_json(json.loads(file.read_text()), where=file)
    settings.detector.precision = Precision(wanted.precision)
    return settings, wanted


def _recorded(
    settings: Settings, detector: FrameDetector, writer: CacheWriter, footage: Sequence[Footage]
) -> dict[str, Footage]:
    """Put new footage down in the cache's record, if there is room for it; returns what is to extract, by group.

    What others have put down and not finished is theirs.
    """
    with locked(writer.path):
        known = read_record(writer.path) if (writer.path / RECORD).exists() else []
        everything = [*known, *(piece for piece in footage if piece not in known)]
        asked = {video_group_name(everything.index(piece) + 1): piece for piece in footage}
        work = {name: asked[name] for name in writer.pending(asked)}
        if work and not settings.cache.ignore_space:
            videos = [_attributes(settings, piece) for piece in work.values()]
            cost = frame_cost(detector, videos[0].image_hw)
            needed = stored_bytes(videos, cost.channels * BYTES_OF_FLOAT16, cost)
            total = sum(video.num_frames for video in videos)
            require_features_fit(needed, writer.path, total, hint="take fewer frames (--stride), another cache.path")
        write_record(writer.path, everything)
        write_cache_card(writer.path, settings, FOLDER, f"{len(everything)} videos of your own (footage.json)")
    return work


def _extract(settings: Settings, detector: FrameDetector, writer: CacheWriter, work: Mapping[str, Footage]) -> None:
    runner = BatchRunner(detector, settings.detector.batch_frames)
    with (
        ThreadPoolExecutor(max_workers=1) as decoder,
        StageProgress("extract", unit="frame", total=sum(len(piece.seconds) for piece in work.values())) as progress,
        BackgroundWriter(writer) as background,
    ):
        for name, piece in work.items():
            attributes = _attributes(settings, piece)
            batches = _batches(piece, attributes.image_hw, runner, settings.detector.decoder)
            with background.video(name, attributes) as sink:
                for images in _ahead(batches, decoder):
                    features = runner.features(images)
                    # Halved on the device: that is what the cache holds.
                    queries, maps = features.frame_queries_BLQC.half(), features.mask_features_BCHW.half()
                    sink.append(queries.cpu().numpy(), maps.cpu().numpy())
                    progress.advance(len(images))


def _attributes(settings: Settings, piece: Footage) -> VideoAttributes:
    return attributes_of(len(piece.seconds), (piece.height, piece.width), settings.detector.short_edge)


def _batches(piece: Footage, image_hw: Size, runner: BatchRunner, decoder: Decoder) -> Iterator[Tensor]:
    """Frames in order as (b, 3, H, W) uint8, resized as those of a data set are."""
    transform = Transform.resize((piece.height, piece.width), image_hw)

    def resized(frame: NDArray[np.uint8]) -> Tensor:
        if decoder is Decoder.torchvision:
            return on_tensor(torch.from_numpy(frame).permute(2, 0, 1), transform)
        return torch.from_numpy(np.array(transform.on_image(Image.fromarray(frame)))).permute(2, 0, 1)

    frames = map(resized, piece.frames())
    while batch := list(islice(frames, runner.batch_frames(image_hw))):
        yield torch.stack(batch)


def _ahead(batches: Iterator[Tensor], decoder: ThreadPoolExecutor) -> Iterator[Tensor]:
    """The same batches, the next one decoded while the detector works on this one."""
    waiting = decoder.submit(next, batches, None)
    while (batch := waiting.result()) is not None:
        waiting = decoder.submit(next, batches, None)
        yield batch
