"""Sweeps: one run per combination of comma-separated settings, all from one cache, and one table at the end."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch

from cache.command import INTERRUPTED, PART_OF
from cache.errors import ConfigError, VitaCacheError, some
from cache.progress import say
from configs.load import load_settings
from train_head.data.video_sets import open_labelled_set

LOG = "sweep.log"  # in the folder of a run: what it said, where several ran at once
_ALL = "all"  # of a sweep over nothing but seeds
METRICS = ("AP", "AP50", "AP75", "AR1", "AR10")
_NOT_NAMED = str.maketrans("", "", "[]{}'\" ")  # characters that folders of runs leave out
_COMMA = re.compile(r",(?![^\[]*\])")  # commas inside [1,2] belong to a value


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One combination: its run's name, its settings, and the part of them that is not the seed."""

    name: str
    overrides: tuple[str, ...]
    variant: str


def plan(base_name: str, overrides: Sequence[str]) -> list[SweepRun]:
    """Expand `a=1,2 seed=0,1` into its product; what does not vary is passed on and does not enter the names.

    Raises ConfigError where two combinations would share a name.
    """
    fixed: list[str] = []
    varied: list[list[str]] = []
    for override in overrides:
        key, _, value = override.partition("=")
        values = _COMMA.split(value)
        if len(values) > 1:
            varied.append([f"{key}={single}" for single in values])
        else:
            fixed.append(override)
    runs = []
    for chosen in itertools.product(*varied):
        variant = " ".join(word for word in chosen if not word.startswith("seed="))
        suffix = "-".join(re.sub(r"[^\w.=-]+", "_", word.translate(_NOT_NAMED)) for word in chosen)
        name = f"{base_name}-{suffix}" if suffix else base_name
        runs.append(SweepRun(name=name, overrides=(*fixed, *chosen), variant=variant))
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise ConfigError("two combinations would have one run", got=twice[0], hint="give every value once")
    return runs


def sweep(config: str, overrides: Sequence[str], jobs: int = 1) -> None:
    """Train every combination that is not trained yet, evaluate all, `jobs` at once, and print the table.

    Every run is a process of its own, so that one cannot influence another; where several run at once, they share
    the cores and the GPUs, and write what they say to their LOG. Raises VitaCacheError before the first run starts for
    impossible settings or a split without labels, and in the end, below the others' table, where runs have failed.
    """
    if jobs < 1:
        raise ConfigError("a sweep has at least one run at a time", where="--jobs", got=jobs)
    base = load_settings(config, [word for word in overrides if not _COMMA.search(word.partition("=")[2])])
    runs = plan(base.name, overrides)
    settings = [load_settings(config, [*run.overrides, f"name={run.name}"]) for run in runs]
    for chosen in settings:
        open_labelled_set(chosen, "the table of a sweep")
    folders = [Path(chosen.runs) / chosen.name for chosen in settings]
    lanes: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in lane_environments(jobs, visible_gpus()):
        lanes.put(environment)
    members = Members()

    def in_a_lane(run: SweepRun, folder: Path) -> str | None:
        environment = lanes.get()
        try:
            return _train_and_evaluate(members, config, run, environment, None if jobs == 1 else folder / LOG)
        finally:
            lanes.put(environment)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            failures = list(pool.map(in_a_lane, runs, folders))
        except KeyboardInterrupt:
            members.stop()
            raise
    done = [(run, folder) for run, folder, failure in zip(runs, folders, failures, strict=True) if failure is None]
    if done:
        rows = [json.loads((folder / "metrics.json").read_text()) for _, folder in done]
        print(table([run.variant for run, _ in done], rows))
    failed = [failure for failure in failures if failure is not None]
    if failed:
        hint = "the same command trains and evaluates what is missing"
        raise VitaCacheError(f"{len(failed)} of {len(runs)} runs failed: {some(failed)}", hint=hint)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(torch.cuda.device_count())] if named is None else named.split(",")


def lane_environments(jobs: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What the runs of each of `jobs` lanes find in their environment: a share of the cores, and one GPU in turn."""
    if jobs == 1:
        return [dict(os.environ)]
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)), **os.environ}
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[lane % len(gpus)]} if gpus else {} for lane in range(jobs)]
    return [{**threads, **device} for device in devices]


class Members:
    """The processes of a sweep's runs, which end with it: asked to, or by themselves where it is killed (PART_OF)."""

    def __init__(self) -> None:
        self._lock, self._running, self._stopped = Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None) -> int:
        """Run a command, its output at the end of `log` where there is one; the exit status."""
        with nullcontext() if log is None else log.open("ab") as output:
            with self._lock:
                if self._stopped:
                    return INTERRUPTED
                errors = None if output is None else subprocess.STDOUT
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
                self._running.add(process)
            status = process.wait()
        self._running.discard(process)
        return status

    def stop(self) -> None:
        """Ask what runs to end, as a cluster does, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def _train_and_evaluate(
    members: Members, config: str, run: SweepRun, environment: Mapping[str, str], log: Path | None
) -> str | None:
    """Returns which run failed, and where it says why."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    for module, verb in (("train_head", "train"), ("evaluate", "run")):
        command = [sys.executable, "-m", module, verb, config, *run.overrides, f"name={run.name}"]
        status = members.run(command, {**environment, PART_OF: "sweep"}, log)
        if status:
            failure = f"{run.name} in `{module} {verb}` ({'see above' if log is None else log})"
            if status != INTERRUPTED:
                say(f"failed: {failure}")
            return failure
    return None


def table(variants: Sequence[str], metrics: Sequence[dict[str, float | None]]) -> str:
    """One row per variant: mean ± sample standard deviation x 100 over its seeds."""
    width = max(len(variant or _ALL) for variant in variants) + 2
    lines = [f"{'':<{width}}{'seeds':>6}" + "".join(f"{key:>14}" for key in METRICS)]
    for variant in dict.fromkeys(variants):
        rows = [row for name, row in zip(variants, metrics, strict=True) if name == variant]
        cells = "".join(f"{_mean_and_spread([row[key] for row in rows]):>14}" for key in METRICS)
        lines.append(f"{variant or _ALL:<{width}}{len(rows):>6}{cells}")
    return "\n".join(lines)


def _mean_and_spread(values: Sequence[float | None]) -> str:
    defined = [100 * value for value in values if value is not None]
    if not defined:
        return "-"
    spread = f" ± {statistics.stdev(defined):.1f}" if len(defined) > 1 else ""
    return f"{statistics.mean(defined):.1f}{spread}"
