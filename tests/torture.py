"""`make torture`: extraction, training and export are killed again and again, and must end as if they never were.

Children are forked from one warm process, run two at a time on one cache, and die by SIGKILL: at a random one of their
operations on files, or at a random moment. After every death all that is readable must be whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from cache.codecs.rate_distortion import CALIBRATION
from cache.errors import VideoBusy
from cache.layout import ANNOTATIONS, CARD, EXTRACTION_RECORD, METADATA
from cache.reader import FeatureCache
from cache.upkeep.transfer import export_hdf5, import_hdf5
from cache.upkeep.verification import verify_root, verify_video
from configs.schema import Settings
from extract.demo.videos import write_split
from extract.detector.engines import configured_detector
from extract.stage import extract
from tests.cache_samples import FILE_EVENTS
from tests.conftest import tiny_settings
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.run_folder import read_metrics_log
from train_head.trainer import train

ROUNDS = 4
"""Of killed processes at most, before one is left alone to finish."""


@dataclass
class Child:
    """A forked process; `died` once it was killed."""

    pid: int
    deadline: float
    died: bool = False
    failed: bool = False


@dataclass
class Torture:
    """One working folder, one random generator, and the deaths so far."""

    folder: Path
    rng: random.Random
    rounds: int
    deaths: dict[str, int] = field(default_factory=lambda: {"extract": 0, "train": 0, "export": 0})

    def attack(self, name: str, work: Callable[[], object], path: Path, events: int, seconds: float, many: int) -> None:
        """Run `work` in `many` processes, each to die at an operation on a file below `path`, or at a moment."""
        children = []
        for _ in range(many):
            by_file = self.rng.random() < 0.7
            fatal = self.rng.randint(1, events) if by_file else 0
            child = self._fork(work, path, fatal)
            child.deadline = time.monotonic() + (600 if by_file else self.rng.uniform(0, seconds))
            children.append(child)
        self._await(children)
        self.deaths[name] += sum(child.died for child in children)

    def finish(self, work: Callable[[], object]) -> float:
        """Run `work` to its end; returns the seconds it took."""
        started = time.monotonic()
        child = self._fork(work, self.folder, 0)
        self._await([child])
        assert not child.died and not child.failed, "an undisturbed process failed"
        return time.monotonic() - started

    def _fork(self, work: Callable[[], object], path: Path, fatal: int) -> Child:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return Child(pid=pid, deadline=time.monotonic() + 600)
        try:
            quiet = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            tqdm.set_lock(threading.RLock())  # The library's own is shared by forks, and would die with its holder.
            torch.set_num_threads(1)  # Makes its thread pool anew, before several threads find none at once.
            if fatal:
                die_at(path, fatal)
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    def _await(self, children: list[Child]) -> None:
        waiting = list(children)
        while waiting:
            for child in list(waiting):
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    waiting.remove(child)
                    child.died = os.WIFSIGNALED(status)
                    child.failed = os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
                    assert not child.failed, (self.folder / "output.txt").read_text()[-3000:]
                elif time.monotonic() > child.deadline:
                    os.kill(child.pid, signal.SIGKILL)
                    child.deadline += 600
            time.sleep(0.005)


def die_at(path: Path, fatal: int) -> None:
    """SIGKILL this process at its n-th operation on a file below `path`."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(path)):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def stored_files(features: Path) -> dict[str, bytes]:
    """All files of a cache but its card, without what tells when: seconds, and who wrote it."""
    files = {
        str(file.relative_to(features)): b"" if file.name in (EXTRACTION_RECORD, CALIBRATION) else file.read_bytes()
        for file in features.rglob("*")
        if file.is_file() and file.name != CARD
    }
    root = json.loads(files[METADATA])
    root["attributes"].pop("provenance")
    return files | {METADATA: json.dumps(root).encode()}


def require_whole(features: Path, expected: dict[str, bytes]) -> None:
    """What a reader may open now must be what an undisturbed extraction stores."""
    if not (features / METADATA).exists():
        return
    feature_cache = FeatureCache.open(features)
    for name in feature_cache.video_names():
        video = feature_cache.video(name)
        assert len(video.frame_queries()) == len(video.mask_features()) == video.attributes.num_frames
        for file, content in expected.items():
            if file.startswith(f"videos/{name}/"):
                assert (features / file).read_bytes() == content, f"{features / file} is not whole"


def require_same(features: Path, expected: dict[str, bytes]) -> None:
    """All files are there, nothing else is, and they hold the same bytes."""
    stored = stored_files(features)
    differing = [name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name)]
    assert not differing, f"{features}: {sorted(differing)} are not those of an undisturbed extraction"


def extract_beside(settings: Settings) -> None:
    """Extract; the other process may still write some videos in the end."""
    with suppress(VideoBusy):
        extract(settings)


def torture_extraction(torture: Torture, data: Path, kills: int, codec: str) -> None:
    """Two extractions at a time into one cache, killed, until `kills` have died; every few rounds one finishes."""
    words = (f"cache.codec={codec}", "cache.calibration_frames=6")
    reference = torture.folder / f"reference_{codec}"
    settings = tiny_settings(data, reference, torture.folder, *words)
    seconds = torture.finish(lambda: extract(settings))
    expected = {split: stored_files(reference / split) for split in ("train", "valid")}
    features = torture.folder / f"features_{codec}"
    killed = tiny_settings(data, features, torture.folder, *words)
    goal = torture.deaths["extract"] + kills
    while torture.deaths["extract"] < goal:
        shutil.rmtree(features, ignore_errors=True)
        for _ in range(torture.rounds):
            torture.attack("extract", lambda: extract_beside(killed), features, 150, seconds, many=2)
            for split, files in expected.items():
                require_whole(features / split, files)
        torture.finish(lambda: extract(killed))
        for split, files in expected.items():
            require_same(features / split, files)
            feature_cache = FeatureCache.open(features / split)
            defects = list(verify_root(feature_cache))
            for name in feature_cache.video_names():
                defects += verify_video(feature_cache, name)
            assert not defects


def torture_training(torture: Torture, settings: Settings, kills: int) -> None:
    """Training, killed and resumed, ends in the weights and losses of a run that never was."""
    runs = Path(settings.runs)
    seconds = torture.finish(lambda: train(settings))
    expected = load_checkpoint(runs / "demo" / CHECKPOINT)
    losses = [entry["loss"] for entry in read_metrics_log(runs / "demo")]
    goal = torture.deaths["train"] + kills
    settings.name = "killed"
    while torture.deaths["train"] < goal:
        shutil.rmtree(runs / "killed", ignore_errors=True)
        for _ in range(torture.rounds):
            torture.attack("train", lambda: train(settings), runs / "killed", 40, seconds, many=1)
            if (runs / "killed" / CHECKPOINT).exists():
                load_checkpoint(runs / "killed" / CHECKPOINT)
        torture.finish(lambda: train(settings))
        resumed = load_checkpoint(runs / "killed" / CHECKPOINT)
        assert all(torch.equal(expected.head[key], resumed.head[key]) for key in expected.head)
        assert [entry["loss"] for entry in read_metrics_log(runs / "killed")] == losses


def torture_export(torture: Torture, features: Path, kills: int) -> None:
    """Export, killed: no file by the final name until it is whole, and import gives the cache back."""
    file, back = torture.folder / "exported.h5", torture.folder / "imported"
    expected = stored_files(features)
    goal = torture.deaths["export"] + kills
    while torture.deaths["export"] < goal:
        torture.attack(
            "export", lambda: export_hdf5(FeatureCache.open(features), file), torture.folder, 60, 0.3, many=1
        )
        if not file.exists():
            continue
        import_hdf5(file, back)
        require_same(back, {name: content for name, content in expected.items() if name != EXTRACTION_RECORD})
        assert not list(torture.folder.glob(".*.tmp"))
        shutil.rmtree(back)
        file.unlink()


def main() -> None:
    """Torture until so many have died, and print the count."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of extraction; training and export: a fifth each")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vita-cache-torture-") as folder:
        data, few = Path(folder) / "data", max(1, chosen.kills // 5)
        write_split(data, "train", 3, num_frames=4)
        write_split(data, "valid", 1, num_frames=4)
        torture = Torture(folder=Path(folder), rng=random.Random(chosen.seed), rounds=min(ROUNDS, few + 1))
        configured_detector(tiny_settings(data, data, data))  # imports what children then need not
        torture_extraction(torture, data, chosen.kills - few, "float16")
        torture_extraction(torture, data, few, "logit")
        features = Path(folder) / "features_float16"
        assert (features / "train" / ANNOTATIONS).exists()
        words = ("train.checkpoint_every=1", "train.workers=0")
        torture_training(torture, tiny_settings(data, features, Path(folder) / "runs", *words), few)
        torture_export(torture, features / "train", few)
    counts = ", ".join(f"{count} of {name}" for name, count in torture.deaths.items())
    print(f"killed: {counts}; all ended as if undisturbed ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
