"""What an extraction leaves in the cache beside features: what it cost, and which videos it skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cache.layout import EXTRACTION_RECORD, SKIPPED, write_file_atomically
from cache.storage.locks import locked
from cache.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord:
    """What one split's extraction has cost so far, over all sessions and processes."""

    seconds: float = 0.0
    frames: int = 0
    bytes: int = 0


def add_to_record(writer: CacheWriter, seconds: float, frames: int) -> None:
    """Add a session's cost."""
    path = writer.path / EXTRACTION_RECORD
    with locked(writer.path):
        before = ExtractionRecord(**json.loads(path.read_text())) if path.exists() else ExtractionRecord()
        record = ExtractionRecord(
            seconds=before.seconds + seconds, frames=before.frames + frames, bytes=writer.total_bytes()
        )
        write_file_atomically(path, json.dumps(asdict(record)).encode())


def write_skipped(writer: CacheWriter, skipped: Mapping[str, Exception]) -> None:
    """Name the videos that were left out, and why, in `skipped.json`; no such file where there are none.

    What other sessions have left out and nobody has extracted since stays in it.
    """
    path = writer.path / SKIPPED
    with locked(writer.path):
        reasons = json.loads(path.read_text()) if path.exists() else {}
        reasons |= {name: str(error) for name, error in skipped.items()}
        reasons = {name: reasons[name] for name in sorted(writer.pending(reasons))}
        if reasons:
            write_file_atomically(path, json.dumps(reasons, indent=1, ensure_ascii=False).encode())
        else:
            path.unlink(missing_ok=True)
