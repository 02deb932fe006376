"""What a cache's numbers depend on (fingerprint) and what is merely good to know about them (provenance)."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cache.errors import CorruptData, FingerprintMismatch
from cache.layout import FORMAT_VERSION

HEAD_FINGERPRINT = "fingerprint.json"
"""In the folder of a run, beside its checkpoint: what its head was trained on, for stage one, which reads no heads."""

PILLOW = "pillow"
RECORDED_LIBRARIES = ("numpy", "zarr", "torch", "torchvision", "transformers", "detectron2")


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The content that decides every stored feature; never a path, a time or a host.

    Two caches of equal fingerprint hold interchangeable features: a frame gives the same numbers in both.
    Labels and the list of videos are not in it, since no feature depends on them; views are not, because a
    view's transform is part of its group's name. FORMAT.md tells what each change costs.
    """

    weights_sha256: str = field(metadata={"words": "detector weights"})
    architecture: str = field(metadata={"words": "detector architecture"})
    num_layers: int = field(metadata={"words": "number of stored detector layers"})
    short_edge: int = field(metadata={"words": "short edge of the network input (pixels)"})
    pixel_mean: tuple[float, ...] = field(metadata={"words": "pixel mean"})
    pixel_std: tuple[float, ...] = field(metadata={"words": "pixel standard deviation"})
    padding_divisor: int = field(metadata={"words": "padding divisor"})
    precision: str = field(metadata={"words": "numerical precision of the detector"})
    codec: str = field(default="float16", metadata={"words": "mask feature codec"})
    decoder: str = field(default=PILLOW, metadata={"words": "decoder of the frames"})
    format_version: int = field(default=FORMAT_VERSION, metadata={"words": "format version"})

    def __post_init__(self) -> None:
        # 1 and 1.0 are equal but differ as JSON, and so would their digests.
        object.__setattr__(self, "pixel_mean", tuple(float(number) for number in self.pixel_mean))
        object.__setattr__(self, "pixel_std", tuple(float(number) for number in self.pixel_std))

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: sorted keys, no spaces."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, other: Fingerprint) -> list[str]:
        """One sentence for each field in which `other` differs from this; empty where they are equal."""
        mine, others = asdict(self), asdict(other)
        return [
            f"{entry.metadata['words']}: {_short(mine[entry.name])} here, {_short(others[entry.name])} there"
            for entry in fields(self)
            if mine[entry.name] != others[entry.name]
        ]

    def require(self, wanted: Fingerprint, *, where: object, hint: str) -> None:
        """Raise FingerprintMismatch in words where the cache at `where` (self) is not what is `wanted`."""
        differences = self.differences(wanted)
        if differences:
            what = "the cache (here) and the request (there) differ in " + "; ".join(differences)
            raise FingerprintMismatch(what, where=where, hint=hint)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the root's attributes; without the decoder where it is Pillow, as in caches before it."""
        values = asdict(self)
        if self.decoder == PILLOW:
            del values["decoder"]
        return values

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], *, where: object) -> Fingerprint:
        """Read the root's attribute. Raises CorruptData where keys are missing or unknown."""
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            return cls(**values)
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise CorruptData(f"unreadable fingerprint: {error}", where=where) from error


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest(file_names: Sequence[str], height: int, width: int) -> str:
    """What identifies a video's frames in a label file: their names, order and size (SHA-256, hex)."""
    canonical = json.dumps([list(file_names), height, width], separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Facts about one writing session, for people; they never decide whether a cache may be used."""

    date: str
    host: str
    command: str
    libraries: Mapping[str, str]
    paths: Mapping[str, str]

    @classmethod
    def gather(cls, paths: Mapping[str, str] | None = None) -> Provenance:
        """Of this process, now; `paths` names the files it works on, such as weights and data root."""
        libraries = {"python": platform.python_version()}
        for library in RECORDED_LIBRARIES:
            try:
                libraries[library] = version(library)
            except PackageNotFoundError:
                continue
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            host=f"{platform.node()} ({platform.system()} {platform.machine()})",
            command=" ".join(sys.argv),
            libraries=libraries,
            paths=dict(paths or {}),
        )
