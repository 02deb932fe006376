"""What an extraction leaves in the cache beside features: what it cost, and which videos it skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from cache.layout import EXTRACTION_RECORD, SKIPPED, write_file_atomically
from cache.reader import FeatureCache
from cache.storage.folder import FolderStore
from cache.storage.locks import locked
from cache.upkeep.inspection import ExtractionRecord
from cache.writer import CacheWriter


def add_to_record(writer: CacheWriter, seconds: float, frames: int) -> None:
    """Add a session's cost."""
    with locked(writer.path):
        before = ExtractionRecord.read(FolderStore(path=writer.path))
        record = ExtractionRecord(
            seconds=before.seconds + seconds, frames=before.frames + frames, bytes=writer.total_bytes()
        )
        write_file_atomically(writer.path / EXTRACTION_RECORD, json.dumps(asdict(record)).encode())


def write_skipped(writer: CacheWriter, skipped: Mapping[str, Exception]) -> None:
    """Name the videos that were left out, and why, in `skipped.json`; no such file where there are none.

    What other sessions have left out and nobody has extracted since stays in it. Raises as FeatureCache.skipped.
    """
    path = writer.path / SKIPPED
    with locked(writer.path):
        reasons = FeatureCache.open(writer.path).skipped()
        reasons |= {name: str(error) for name, error in skipped.items()}
        reasons = {name: reasons[name] for name in sorted(writer.pending(reasons))}
        if reasons:
            write_file_atomically(path, json.dumps(reasons, indent=1, ensure_ascii=False).encode())
        else:
            path.unlink(missing_ok=True)
