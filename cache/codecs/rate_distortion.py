"""The rate-distortion table of a cache: what each codec costs and what it does to the detector's own masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import CorruptData
from cache.layout import write_file_atomically
from cache.storage.stores import open_store

CALIBRATION = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """One codec on the held-out calibration frames; means over frames where not said otherwise."""

    codec: str
    setting: str
    """In words, "" where there is none."""
    stored_channels: int
    bytes_per_frame: float
    """Mask features and frame queries, checksums included."""
    feature_error: float
    """Root mean square, relative to the features' standard deviation."""
    logit_error: float
    """Root mean square, relative to the logits' standard deviation."""
    mask_iou: float
    """Mean over frames and objects of the IoU of the detector's masks from exact and from stored features."""
    mask_iou_p5: float
    """5th percentile of the same."""
    encode_ms: float
    """Encoding and compressing a frame."""
    decode_ms: float
    """Decompressing a frame and converting it to channels at pixels in float32; nothing else is ever undone."""
    bytes_per_location: float = 0.0
    """Mask features alone, a position of the map; 0 in tables of caches that are older than this figure."""

    @property
    def label(self) -> str:
        """Codec and setting, such as `logit 1/128`."""
        return f"{self.codec} {self.setting}".strip()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The measured codecs, smallest first, and which of them the cache uses."""

    rows: tuple[Distortion, ...]
    chosen: int
    min_mask_iou: float
    fitted_frames: int
    held_out_frames: int


def smallest_faithful(rows: Sequence[Distortion], min_mask_iou: float) -> int:
    """Index of the smallest row whose mean IoU suffices; else of the most faithful one, of equals by their logits."""
    faithful = [index for index, row in enumerate(rows) if row.mask_iou >= min_mask_iou]
    if faithful:
        return min(faithful, key=lambda index: rows[index].bytes_per_frame)
    return max(range(len(rows)), key=lambda index: (rows[index].mask_iou, -rows[index].logit_error))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Store the table beside the cache's root metadata."""
    write_file_atomically(path / CALIBRATION, json.dumps(asdict(calibration), indent=1).encode())


def read_calibration(path: Path | str) -> Calibration | None:
    """The table stored with the cache at `path` (of any store), None where there is none. Raises CorruptData."""
    content = open_store(path).read_file(CALIBRATION)
    if content is None:
        return None
    try:
        stored = json.loads(content)
        return Calibration(**{**stored, "rows": tuple(Distortion(**row) for row in stored["rows"])})
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(
            f"unreadable calibration: {error!r}", where=Path(path) / CALIBRATION, hint="delete it"
        ) from error


def choice_in_words(calibration: Calibration, automatic: bool) -> str:
    """Which codec a cache takes and why; `automatic`: it was chosen by its measurements, not by name."""
    row, wanted = calibration.rows[calibration.chosen], calibration.min_mask_iou
    measured = f"mean mask IoU {row.mask_iou:.4f} on {calibration.held_out_frames} held-out frames"
    cost = f"({measured}, {row.bytes_per_frame / 1e6:.3f} MB a frame)"
    if not automatic:
        text = f"codec: {row.label}, as cache.codec says {cost}"
        if row.mask_iou >= wanted:
            return text
        other = calibration.rows[smallest_faithful(calibration.rows, wanted)]
        alternative = (
            f"cache.codec=auto takes {other.label} ({other.mask_iou:.4f}, {other.bytes_per_frame / 1e6:.3f} MB)"
        )
        return (
            f"{text}\nwarning: it keeps less of the detector's masks than cache.min_mask_iou={wanted:g}; {alternative}"
        )
    if row.mask_iou >= wanted:
        return f"codec: {row.label}, the smallest that keeps {wanted:g} {cost}"
    return f"warning: NO CODEC keeps cache.min_mask_iou={wanted:g}; the most faithful one is taken: {row.label} {cost}"


def format_table(calibration: Calibration) -> str:
    """The table as text; the chosen row is marked."""
    lines = [
        f"codecs on {calibration.held_out_frames} held-out frames (fitted to {calibration.fitted_frames}); "
        f"* is used; wanted mask IoU {calibration.min_mask_iou:g}",
        f"  {'codec':<24} {'R':>4} {'bytes/frame':>12} {'feature err':>12} {'logit err':>10} {'mask IoU':>9} "
        f"{'5th pct':>8} {'encode ms':>10} {'decode ms':>10}",
    ]
    for index, row in enumerate(calibration.rows):
        lines.append(
            f"{'*' if index == calibration.chosen else ' '} {row.label:<24} {row.stored_channels:>4} "
            f"{row.bytes_per_frame:>12,.0f} {row.feature_error:>12.4f} {row.logit_error:>10.4f} {row.mask_iou:>9.4f} "
            f"{row.mask_iou_p5:>8.4f} {row.encode_ms:>10.2f} {row.decode_ms:>10.2f}"
        )
    return "\n".join(lines)
