"""A run's checkpoint: what it trained, and what is needed to go on training and to refuse another cache."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from cache.archives import require_sound_archive
from cache.errors import ConfigError, FingerprintMismatch, WeightsError, first_line
from cache.fingerprint import HEAD_FINGERPRINT, Fingerprint
from cache.layout import sync_to_disk, write_file_atomically
from cache.reader import FeatureCache
from configs.schema import HeadKind, HeadSettings
from train_head.heads.contract import HeadConfig, TrackHead
from train_head.heads.kinds import build_head

CHECKPOINT = "checkpoint.pt"  # the newest
BEST = "best.pt"  # the one of the highest AP among those evaluated while training
_VERSION = 1


@dataclass(kw_only=True)
class Progress:
    """How far a run is: what a checkpoint stores beside weights."""

    step: int = 0
    seconds: float = 0.0
    best_ap: float = -1.0
    evaluated: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State after `step` training steps; `head` has the release's names without their prefix.

    A run that fine-tuned the detector alone has an empty `head`. The fingerprint of one that fine-tuned the detector
    is that of a cache which its exported detector fills.
    """

    step: int
    seconds: float  # spent training, over all sessions
    config: HeadConfig
    head: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    fingerprint: Fingerprint  # of the cache it was trained from
    category_names: tuple[str, ...]
    average: Mapping[str, torch.Tensor] = field(default_factory=dict)  # moving average of `head`, where it is kept
    best_ap: float = -1.0  # highest AP so far, a fraction
    evaluated: int = 0  # the last step that was evaluated while training
    detector: Mapping[str, torch.Tensor] = field(default_factory=dict)  # official names; empty where it is frozen

    @property
    def final_head(self) -> Mapping[str, torch.Tensor]:
        """What is evaluated and exported: averaged weights where they are kept. Raises WeightsError without a head."""
        if not self.head:
            hint = "extract with detector.weights=<run>/detector, then train a head"
            raise WeightsError("this run fine-tuned the detector alone: it has no head", hint=hint)
        return self.average or self.head

    def build_head(self, device: torch.device | str) -> TrackHead:
        """Return the head in evaluation mode; raises WeightsError where there is none."""
        head = build_head(self.config)
        head.load_state_dict(dict(self.final_head))
        return head.to(device).eval()

    def require_cache(self, feature_cache: FeatureCache, where: Path, *, any_codec: bool = False) -> None:
        """Raise FingerprintMismatch where the head was trained on other features than this cache holds.

        `any_codec`: codecs may differ. Mask embeddings live in the space of the features themselves and are folded
        into whatever codec a cache has, so a trained head means the same there, up to the codecs' rounding.
        """
        held = feature_cache.fingerprint
        differences = self.fingerprint.differences(
            dataclasses.replace(held, codec=self.fingerprint.codec) if any_codec else held
        )
        if differences:
            raise FingerprintMismatch(
                f"this head was trained on other features than {feature_cache.path} holds: the head (here) and "
                f"the cache (there) differ in {'; '.join(differences)}",
                where=where,
                hint="train a head from this cache (`make train name=...`), or point cache.path at the head's cache",
            )

    def require_categories(self, names: Sequence[str], where: Path) -> None:
        """Raise FingerprintMismatch where the head's categories are not these, in this order: it knows only numbers."""
        if self.category_names == tuple(names):
            return
        pairs = enumerate(zip_longest(self.category_names, names, fillvalue="none"), start=1)
        number, mine, others = next((number, a, b) for number, (a, b) in pairs if a != b)
        raise FingerprintMismatch(
            f"the labels have other categories than this head, the first of them number {number}",
            where=where,
            expected=f"{mine!r}, of {len(self.category_names)}",
            got=f"{others!r}, of {len(names)}",
            hint="train a head on these labels (`make train name=...`), or use the labels that it was trained on",
        )

    def other_settings(self, asked: HeadSettings) -> list[str]:
        """What this head has, of all settings of the head that are asked for otherwise."""
        mine = dataclasses.asdict(self.config)
        return [_in_words(name, mine[name]) for name, value in dataclasses.asdict(asked).items() if value != mine[name]]

    def require_config(self, wanted: HeadConfig, where: Path) -> None:
        """Raise ConfigError where the settings ask for another head than this."""
        mine, others = dataclasses.asdict(self.config), dataclasses.asdict(wanted)
        differing = [_in_words(name, mine[name]) for name in mine if mine[name] != others[name]]
        if differing:
            raise ConfigError(
                f"the settings ask for another head: in the checkpoint {', '.join(differing)}",
                where=where,
                hint="set these to train on from it; sizes that are no setting are the detector's and the labels'",
            )


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a killed run leaves the old checkpoint or the new one."""
    fingerprint = json.dumps(checkpoint.fingerprint.to_json(), indent=1)
    write_file_atomically(path.with_name(HEAD_FINGERPRINT), fingerprint.encode())
    state = {
        "version": _VERSION,
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "config": dataclasses.asdict(checkpoint.config) | {"kind": checkpoint.config.kind.value},
        "head": dict(checkpoint.head),
        "optimizer": dict(checkpoint.optimizer),
        "fingerprint": checkpoint.fingerprint.to_json(),
        "category_names": list(checkpoint.category_names),
        "average": dict(checkpoint.average),
        "best_ap": checkpoint.best_ap,
        "evaluated": checkpoint.evaluated,
        "detector": dict(checkpoint.detector),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_to_disk(path.parent)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, to the CPU: what a device lacks is no fault of the file.

    Nothing in it can run code. Raises WeightsError for anything but a whole one.
    """
    if not path.is_file():
        hint = "`make train` with the same config writes one"
        if path.name == BEST:
            hint = "train with train.evaluate_every=N to keep the best, or set evaluate.checkpoint=last"
        raise WeightsError("no trained head here", where=path, hint=hint)
    try:
        require_sound_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(
            step=state["step"],
            seconds=state["seconds"],
            config=_head_config(state["config"]),
            head=state["head"],
            optimizer=state["optimizer"],
            fingerprint=Fingerprint.from_json(state["fingerprint"], where=path),
            category_names=tuple(state["category_names"]),
            average=state["average"],
            best_ap=state["best_ap"],
            evaluated=state.get("evaluated", state["step"]),  # older ones do not say
            detector=state.get("detector", {}),
        )
    except (PermissionError, MemoryError) as error:
        raise WeightsError(f"cannot be read: {first_line(error)}", where=path) from error
    except Exception as error:  # a damaged file can fail anywhere in its reader
        reason = first_line(error)
        raise WeightsError(
            f"not a checkpoint of vita-cache: {reason}", where=path, hint="delete it to train anew"
        ) from error


def _in_words(name: str, value: object) -> str:
    """The setting that decides an entry of a HeadConfig, or what else does."""
    if name == "use_sim":
        return "loss.sim_weight is above 0" if value else "loss.sim_weight is 0"
    known = {field.name for field in dataclasses.fields(HeadSettings)}
    return f"head.{name} is {value}" if name in known else f"{name} is {value} (of another detector or label file)"


def _head_config(stored: Mapping[str, Any]) -> HeadConfig:
    """A stored config; those of before there were kinds of heads are VITA's."""
    return HeadConfig(**{**stored, "kind": HeadKind(stored.get("kind", HeadKind.vita.value))})
