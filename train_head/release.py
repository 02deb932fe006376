"""Released VITA checkpoints (detector and `vita_module.*` in one file) to our checkpoint and back, bit for bit.

A head is nothing without the features that it was trained on: importing needs the cache that it will read, takes
that cache's fingerprint, and checks that the file's own detector is the one that filled the cache.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache.errors import ConfigError, FingerprintMismatch, WeightsError
from cache.fingerprint import Provenance, sha256_file
from cache.heads import HEAD_SHAPES
from cache.labels.tracks import Labels
from cache.layout import write_file_atomically
from cache.reader import FeatureCache
from configs.cards import write_import_card
from configs.schema import CodecName, Decoder, HeadKind, HeadSettings, Settings
from train_head.build import feature_sizes
from train_head.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from train_head.detector_files import read_weight_file
from train_head.heads.contract import HeadConfig
from train_head.heads.vita import RELEASE_PREFIX, VitaHead, strip_release_prefix
from train_head.run_folder import PROVENANCE, write_config

_LISTED = 5
_HOLDOUT = 0.1  # as in the configs of data sets whose validation labels are not public
_SEEN = "\nwarning: its config evaluates on train videos, which a released head has been trained on"


def import_file(source: Path, run: Path, features: Path, *, num_heads: int, window: int) -> str:
    """Write the head of a released file as a run's checkpoint; returns what was done, in words.

    `num_heads` and `window` cannot be read from shapes. Raises ConfigError where the run has a head already,
    WeightsError where the file cannot be read, holds no VITA head or one that does not fit the cache's sizes,
    FingerprintMismatch where its detector is not the one that filled the cache.
    """
    if (run / CHECKPOINT).exists():
        raise ConfigError("this run has a head already", where=run, hint="choose another --output")
    feature_cache, tensors = FeatureCache.open(features), read_weight_file(source)
    state = strip_release_prefix(tensors)
    config = release_config(state, source, num_heads=num_heads, window=window)
    _require_names(state, config, source)
    labels = feature_cache.labels()
    _require_sizes(config, feature_cache, labels, source)
    detector = _compare_detectors(tensors, feature_cache, source)
    checkpoint = Checkpoint(
        step=0,
        seconds=0.0,
        config=config,
        head=state,
        optimizer={},
        fingerprint=feature_cache.fingerprint,
        category_names=tuple(category.name for category in labels.categories),
    )
    run.mkdir(parents=True, exist_ok=True)
    provenance = Provenance.gather({"release": str(source), "cache": str(features)})
    write_file_atomically(run / PROVENANCE, json.dumps(asdict(provenance), indent=2).encode())
    settings = imported_settings(run, source, feature_cache, config)
    write_config(run, settings)
    save_checkpoint(run / CHECKPOINT, checkpoint)
    write_import_card(run, source, features)
    return (
        f"{run / CHECKPOINT}: {config.enc_layers} encoder + {config.dec_layers} decoder layers, "
        f"{config.num_queries} video queries, {config.num_classes} categories; assumed: {config.num_heads} attention "
        f"heads, window {config.window}\n{detector}{_SEEN if settings.data.holdout else ''}"
    )


def imported_settings(run: Path, source: Path, feature_cache: FeatureCache, config: HeadConfig) -> Settings:
    """What the config of such a run would say, as far as the head and the cache tell; all else is the default.

    Videos to evaluate on are the validation set where that is cached beside the train videos, or else a hold-out.
    """
    features, stored = Path(feature_cache.path), feature_cache.fingerprint
    origin = feature_cache.root.sessions[-1]["paths"] if feature_cache.root.sessions else {}
    is_detector_inside = sha256_file(source) == stored.weights_sha256
    settings = Settings(name=run.name, runs=str(run.parent))
    settings.head = HeadSettings(**{entry.name: getattr(config, entry.name) for entry in fields(HeadSettings)})
    settings.loss.sim_weight = settings.loss.sim_weight if config.use_sim else 0.0
    settings.cache = replace(settings.cache, path=str(features.parent), codec=CodecName(feature_cache.root.codec_name))
    settings.detector = replace(
        settings.detector,
        weights=str(source) if is_detector_inside else origin.get("weights", str(source)),
        num_layers=stored.num_layers,
        short_edge=stored.short_edge or None,
        decoder=Decoder(stored.decoder),
    )
    data = settings.data
    if "labels" in origin and "frames" in origin:
        labels, frames = Path(origin["labels"]), Path(origin["frames"])
        data = replace(data, root=str(labels.parent), train_labels=labels.name)
        data.train_frames = os.path.relpath(frames, labels.parent)
    if not (features.parent / "valid").is_dir():
        data = replace(data, valid_labels=None, valid_frames=None, holdout=_HOLDOUT)
    settings.data = data
    return settings


def export_file(run: Path, target: Path, detector: Path | None) -> str:
    """Write a run's head, as it is evaluated, and detector as a VITA checkpoint; returns what was done.

    Raises ConfigError for a head of another kind, WeightsError where there is none.
    `detector`: an official file; None takes the detector that the run fine-tuned, or none where it is frozen.
    """
    checkpoint = load_checkpoint(run / CHECKPOINT)
    kind = checkpoint.config.kind
    if kind is not HeadKind.vita:
        raise ConfigError("only VITA's head has the release's names", where=run, got=f"head.kind={kind}")
    others = checkpoint.detector if detector is None else read_weight_file(detector)
    model = {name: tensor for name, tensor in others.items() if not name.startswith(RELEASE_PREFIX)}
    head = checkpoint.final_head
    model |= {RELEASE_PREFIX + name: tensor for name, tensor in head.items()}
    temporary = target.with_suffix(".tmp")
    torch.save({"model": model, "iteration": checkpoint.step}, temporary)
    temporary.replace(target)
    which = "averaged tensors" if checkpoint.average else "tensors"
    return f"{target}: {len(head)} {which} of the head, {len(model) - len(head)} others"


def release_config(state: Mapping[str, Tensor], source: Path, *, num_heads: int, window: int) -> HeadConfig:
    """Read the sizes of a head off its tensors' shapes (names without prefix); raises WeightsError."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if not shapes:
        raise WeightsError(
            "no VITA head in this file", where=source, expected=f"tensors named {RELEASE_PREFIX}*", got="none"
        )
    try:
        return HeadConfig(
            num_classes=shapes["class_embed.bias"][0] - 1,
            num_frame_queries=shapes["fq_pos.weight"][0],
            num_queries=shapes["query_embed.weight"][0],
            hidden_dim=shapes["decoder_norm.weight"][0],
            num_heads=num_heads,
            ffn_dim=shapes["transformer_ffn_layers.0.linear1.bias"][0],
            enc_layers=_depth(shapes, "enc_self_attn"),
            dec_layers=_depth(shapes, "transformer_cross_attention_layers"),
            window=window,
            mask_dim=shapes["vita_mask_features.weight"][0],
            detector_dim=shapes["input_proj_dec.weight"][1],
            map_dim=shapes["vita_mask_features.weight"][1],
            use_sim="sim_embed_frame.weight" in shapes,
        )
    except (KeyError, IndexError) as error:
        hint = "heads built with MODEL.VITA.ENFORCE_INPUT_PROJ False have no input_proj_dec and are not read"
        raise WeightsError(f"not the head of VITA: {error} is missing", where=source, hint=hint) from error


def _depth(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    pattern = re.compile(rf"{name}\.(\d+)\.")
    return len({match[1] for key in shapes if (match := pattern.match(key))})


def _require_names(state: Mapping[str, Tensor], config: HeadConfig, source: Path) -> None:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in VitaHead(config).state_dict().items()}
    wrong = [name for name in expected.keys() | state.keys() if name not in state or name not in expected]
    wrong += [name for name in expected.keys() & state.keys() if state[name].shape != expected[name]]
    if wrong:
        listed = ", ".join(sorted(wrong)[:_LISTED])
        raise WeightsError(
            f"{len(wrong)} tensors of the head are missing, unexpected or of another shape: {listed}", where=source
        )


def _require_sizes(config: HeadConfig, feature_cache: FeatureCache, labels: Labels, source: Path) -> None:
    sizes = feature_sizes(feature_cache, labels)
    pairs = {
        "frame queries": (sizes.num_queries, config.num_frame_queries),
        "channels of a frame query": (sizes.hidden_dim, config.detector_dim),
        "channels of the feature map": (sizes.map_channels, config.map_dim),
        "categories": (sizes.num_classes, config.num_classes),
    }
    for words, (held, wanted) in pairs.items():
        if held != wanted:
            raise WeightsError(
                f"the head does not fit {feature_cache.path}: {words}",
                where=source,
                expected=f"{held} (cache)",
                got=wanted,
                hint="extract with the detector and the labels that this head was trained with",
            )


def _compare_detectors(tensors: Mapping[str, Tensor], feature_cache: FeatureCache, source: Path) -> str:
    if sha256_file(source) == feature_cache.fingerprint.weights_sha256:
        return "the cache was extracted from this very file"
    own = {name: tensors.get(_official_name(name)) for name in HEAD_SHAPES}
    if all(tensor is None for tensor in own.values()):
        return "the file holds no detector: whether the head belongs to this cache is taken on trust"
    stored = feature_cache.heads.arrays
    differing = [
        name
        for name, tensor in own.items()
        if tensor is None or not np.array_equal(tensor.float().numpy().reshape(-1), stored[name].reshape(-1))
    ]
    if differing:
        raise FingerprintMismatch(
            f"the file's own detector is not the one that filled {feature_cache.path}: {differing[0]} differs",
            where=source,
            hint=f"extract with detector.weights={source} into another cache.path, and import with that --cache",
        )
    return "the cache was extracted from another file, whose detector has the same prediction heads"


def _official_name(name: str) -> str:
    part = "pixel_decoder" if name.startswith("mask_features.") else "predictor"
    return f"sem_seg_head.{part}.{name}"
