"""`python -m cache bench`: how near reading comes to what the system call itself achieves, in one run.

Everything is read warm (from the page cache) by one thread into the same buffers, in turns, each in another order,
so that whatever else the machine does hits all readers alike; lower quartiles count, since it hits longer reads more
often. The limit is `preadv` of the same stored bytes, one call a frame, from open files at known places. Ratios are
of the clock's seconds and of the processor's, which other work on the machine disturbs less. "First read" opens the
arrays anew in every turn: it reads the shards' indexes and verifies every checksum. Compressed maps are bound by
Zstandard, whoever reads them: their limit is `preadv` and unpacking, bare `preadv` stands beside it, and h5py and
memmap read them uncompressed.
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
from numpy.typing import NDArray

from cache.bench.readers import COMPARED, LIMIT, UNPACKED, Reader, Sample, standard_samples, store_fields
from cache.layout import METADATA, VIDEOS, VideoAttributes, group_metadata, write_file_atomically
from cache.reader import CachedVideo
from cache.storage.folder import FolderStore
from cache.storage.shard_writer import ShardWriter

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
    frames_per_second: float
    gigabytes_per_second: float
    """Of arrays as they lie in memory, whatever was stored."""
    limit: str
    """What speed is compared to: bare preadv, or preadv and unpacking."""
    of_limit: float
    """Speed in terms of the limit's, by the clock."""
    of_limit_processor: float
    """The same by processor time."""


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
        turns = max(6, int(TURNS * scale))
        results = [found for sample in standard_samples(scale) for found in measure(sample, Path(temporary), turns)]
        opening = open_many(Path(temporary) / "many", max(2, int(NUM_VIDEOS * scale)))
    facts = machine()
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    for found in results:
        print(
            f"{found.sample:8} {found.task:12} {found.reader:22} {found.frames_per_second:8.0f} frames/s "
            f"{found.gigabytes_per_second:6.2f} GB/s  {found.of_limit:5.2f} of {found.limit} "
            f"({found.of_limit_processor:.2f} by processor time)"
        )
    print(
        f"opening {opening['videos']:.0f} videos, both fields: {opening['seconds']:.2f} s "
        f"({opening['processor_seconds']:.2f} s of processor time)"
    )
    if output is not None:
        document = {"machine": facts, "reading": [asdict(found) for found in results], "opening": opening}
        output.write_text(json.dumps(document, indent=2))
    return 0


def measure(sample: Sample, folder: Path, num_clips: int) -> list[Measurement]:
    """Read random clips, then the whole video a sixth as often, with every reader."""
    stored = store_fields(sample, folder)
    by_field = [field.readers() for field in stored]
    names = [name for name in by_field[0] if sample.compressed or name != UNPACKED]
    readers = {name: [readers[name] for readers in by_field] for name in names}
    rng = np.random.default_rng(1)
    clips = [sorted(rng.choice(sample.num_frames, CLIP_FRAMES, replace=False).tolist()) for _ in range(num_clips)]
    found = []
    for task, turns in (("random clip", clips), ("whole video", [range(sample.num_frames)] * (num_clips // 6))):
        buffers = [np.zeros((len(turns[0]), *field.shape[1:]), field.dtype) for field in stored]
        quartiles = _in_turns(readers, buffers, turns)
        limit = UNPACKED if sample.compressed else LIMIT
        found += [_measurement(sample, task, name, len(turns[0]), quartiles, limit) for name in quartiles]
    for field in stored:
        shutil.rmtree(field.folder)
    return found


def _measurement(
    sample: Sample, task: str, name: str, num_frames: int, quartiles: dict[str, NDArray[np.float64]], limit: str
) -> Measurement:
    """`quartiles`: seconds by the clock and of the processor, of every reader."""
    times, limits = quartiles[name], quartiles[limit]
    return Measurement(
        sample=sample.name,
        task=task,
        reader=name,
        seconds=float(times[0]),
        frames_per_second=num_frames / times[0],
        gigabytes_per_second=sample.frame_bytes * num_frames / times[0] / 1e9,
        limit=limit,
        of_limit=float(limits[0] / times[0]),
        of_limit_processor=float(limits[1] / times[1]),
    )


def _in_turns(
    readers: dict[str, list[Reader]], buffers: list[Any], turns: Sequence[Sequence[int]]
) -> dict[str, NDArray[np.float64]]:
    """The lower quartile of each reader's times, in seconds: by the clock, of the processor."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    order = list(readers)
    for turn, frames in enumerate(turns):
        order.append(order.pop(0))
        for name in order:
            if name in COMPARED or turn % 6 == 0:  # the others are far slower
                times[name].append(_seconds(readers[name], buffers, frames))
    return {name: np.quantile(found, 0.25, axis=0) for name, found in times.items()}


def _seconds(reads: list[Reader], buffers: list[Any], frames: Sequence[int]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    for read, buffer in zip(reads, buffers, strict=True):
        read(frames, buffer)
    return time.perf_counter() - clock, time.process_time() - processor


def open_many(folder: Path, num_videos: int) -> dict[str, float]:
    """Time to read the attributes of all videos and the metadata of both their fields."""
    attributes = VideoAttributes(num_frames=1, image_hw=(32, 32), padded_hw=(32, 32), original_hw=(32, 32))
    first = folder / VIDEOS / "0"
    first.mkdir(parents=True)
    for name, shape in (("frame_queries", (1, 1, 1, 1)), ("mask_features", (1, 1, *attributes.map_hw))):
        writer = ShardWriter(first / name, 1, np.ones(shape, "<f2"), tuple("TLQC"))
        writer.append(np.ones(shape, "<f2"))
        writer.finish()
    write_file_atomically(first / METADATA, group_metadata({"complete": True, **attributes.to_json()}))
    for number in range(1, num_videos):
        shutil.copytree(first, folder / VIDEOS / str(number))
    seconds, processor_seconds = np.median([_opening_seconds(FolderStore(path=folder)) for _ in range(3)], axis=0)
    return {"videos": num_videos, "seconds": float(seconds), "processor_seconds": float(processor_seconds)}


def _opening_seconds(store: FolderStore) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    for name, _ in store.videos():
        stored = store.attributes(f"{VIDEOS}/{name}") or {}
        found = VideoAttributes.from_json(stored, where=name)
        video = CachedVideo(name=name, store=store, attributes=found, source=None)
        _ = video.queries, video.maps
    return time.perf_counter() - clock, time.process_time() - processor
