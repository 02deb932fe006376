"""`python -m cache bench`: how near reading comes to what the system call itself achieves, in one run.

Everything is read warm (from the page cache) into the same buffers, in turns, so that whatever else the machine
does hits all readers alike; the best of many turns counts.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cache.bench_readers import COMPARED, LIMIT, Reader, Sample, standard_samples, store_field
from cache.layout import VIDEOS, VideoAttributes, group_metadata, write_file_atomically
from cache.reader import CachedVideo
from cache.shard_writer import ShardWriter
from cache.stores import FolderStore

CLIP_FRAMES = 6
TURNS = 60
NUM_VIDEOS = 2000


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One reader at one task."""

    sample: str
    task: str
    reader: str
    seconds: float
    gigabytes_per_second: float
    of_limit: float
    """Speed in terms of bare preadv; 1 is the limit."""


def machine() -> dict[str, str]:
    """What the figures depend on: processor, versions, commit, date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    models = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "processor": f"{len(models)} x {models[0].partition(': ')[2]}" if models else platform.processor(),
        "load": _read("/proc/loadavg").partition(" ")[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "zarr", "h5py", "fastcrc")},
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def bench(folder: Path | None, output: Path | None, scale: float) -> int:
    """Measure in a temporary folder below `folder`, print the table, and write JSON to `output`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="vita-cache-bench-") as temporary:
        results = [found for sample in standard_samples(scale) for found in measure(sample, Path(temporary))]
        opening = open_many(Path(temporary) / "many", max(2, int(NUM_VIDEOS * scale)))
    facts = machine()
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    for found in results:
        print(
            f"{found.sample:10} {found.task:12} {found.reader:20} {found.gigabytes_per_second:7.2f} GB/s  "
            f"{found.of_limit:5.2f} of preadv"
        )
    print(f"opening {opening['videos']:.0f} videos, both fields: {opening['seconds']:.2f} s")
    if output is not None:
        document = {"machine": facts, "reading": [asdict(found) for found in results], "opening": opening}
        output.write_text(json.dumps(document, indent=2))
    return 0


def measure(sample: Sample, folder: Path) -> list[Measurement]:
    """Read random clips, then the whole video, with every reader."""
    stored = [
        store_field(folder / f"{sample.name.replace(' ', '-')}-{index}", sample.num_frames, shape, dtype)
        for index, (shape, dtype) in enumerate(sample.fields)
    ]
    by_field = [field.readers() for field in stored]
    readers = {name: [readers[name] for readers in by_field] for name in by_field[0]}
    rng = np.random.default_rng(1)
    clips = [sorted(rng.choice(sample.num_frames, CLIP_FRAMES, replace=False).tolist()) for _ in range(TURNS)]
    found = []
    for task, turns in (("random clip", clips), ("whole video", [range(sample.num_frames)] * (TURNS // 6))):
        buffers = [np.zeros((len(turns[0]), *field.shape[1:]), field.dtype) for field in stored]
        seconds = _in_turns(readers, buffers, turns)
        size = sample.frame_bytes * len(turns[0])
        found += [
            Measurement(
                sample=sample.name,
                task=task,
                reader=name,
                seconds=best,
                gigabytes_per_second=size / best / 1e9,
                of_limit=seconds[LIMIT] / best,
            )
            for name, best in seconds.items()
        ]
    for field in stored:
        shutil.rmtree(field.folder)
    return found


def _in_turns(readers: dict[str, list[Reader]], buffers: list[Any], turns: Sequence[Sequence[int]]) -> dict[str, float]:
    """The best time of each reader, in seconds."""
    best = dict.fromkeys(readers, float("inf"))
    for turn, frames in enumerate(turns):
        for name, reads in readers.items():
            if name in COMPARED or turn % 6 == 0:  # the others are far slower
                best[name] = min(best[name], _seconds(reads, buffers, frames))
    return best


def _seconds(reads: list[Reader], buffers: list[Any], frames: Sequence[int]) -> float:
    started = time.perf_counter()
    for read, buffer in zip(reads, buffers, strict=True):
        read(frames, buffer)
    return time.perf_counter() - started


def open_many(folder: Path, num_videos: int) -> dict[str, float]:
    """Time to read the attributes of all videos and the metadata of both their fields."""
    attributes = VideoAttributes(num_frames=1, image_hw=(32, 32), padded_hw=(32, 32), original_hw=(32, 32))
    first = folder / VIDEOS / "0"
    first.mkdir(parents=True)
    for name, shape in (("frame_queries", (1, 1, 1, 1)), ("mask_features", (1, 1, *attributes.map_hw))):
        writer = ShardWriter(first / name, 1, np.ones(shape, "<f2"), tuple("TLQC"))
        writer.append(np.ones(shape, "<f2"))
        writer.finish()
    write_file_atomically(first / "zarr.json", group_metadata({"complete": True, **attributes.to_json()}))
    for number in range(1, num_videos):
        shutil.copytree(first, folder / VIDEOS / str(number))
    started = time.perf_counter()
    store = FolderStore(path=folder)
    for name, _ in store.videos():
        stored = store.attributes(f"{VIDEOS}/{name}") or {}
        found = VideoAttributes.from_json(stored, where=name)
        video = CachedVideo(name=name, store=store, attributes=found, source=None)
        _ = video.queries, video.maps
    return {"videos": num_videos, "seconds": time.perf_counter() - started}
