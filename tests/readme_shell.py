"""A reader's shell for tests/test_readme.py: a tree of this code with small configs and data, .venv activated.

Its `python` forks tests/fork_server.py; `torchrun` goes through it too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from extract.demo.clip import write_clip
from extract.demo.stills import write_stills
from tests.detector_samples import checkpoint_bytes, official_state
from tests.fork_server import ROOT, served_interpreter
from tests.test_release import golden_head_state

# Patterns of what stands for the reader's own files or for much work, and what is here instead.
STAND_INS = {
    r"/data/": "datasets/",
    r"/weights/": "weights/",
    r" CONFIG(?!=)": " demo",
    r"\bgt\.json": "datasets/demo/valid.json",
    r"\bresults\.json": "runs/demo/results.zip",
    r" seed=0,1,2": " seed=0,1",
    r"evaluate_every=\d+": "evaluate_every=2",
    r"^make bench$": "make bench SMALL=1",
    r"^(python -m evaluate max-frames .*)": r"\1 --windows 3 --kept 0.05",
    r"^make demo-compare": "make demo-compare train.iterations=2 train.decay_steps=[1]",
    r"--nproc-per-node=8": "--nproc-per-node=2",
    r"(balance .*) --videos \d+": r"\1 --videos 100",
}

TINY = {
    "device": "cpu",
    "detector": {"batch_frames": 4},
    "cache": {"calibration_frames": 6},
    "head": {"hidden_dim": 64, "mask_dim": 64, "num_queries": 10, "ffn_dim": 32, "enc_layers": 1, "dec_layers": 1},
    "loss": {"num_points": 32},
    "train": {
        "iterations": 2, "batch_clips": 2, "num_frames": 2, "warmup": 1, "decay_steps": [1], "workers": 0,
        "checkpoint_every": 2,
    },
    "evaluate": {"report_videos": 1},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shell:
    """The shell at the repository's root."""

    root: Path

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command with what stands in for the reader's files."""
        return subprocess.run(
            ["bash", "-c", stood_in(command)],
            cwd=self.root,
            env=self.environment() | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def environment(self) -> Mapping[str, str]:
        """Without what `make test` has set."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        return kept | {"PATH": f"{self.root / '.venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def stood_in(command: str) -> str:
    """The command with what is here in the place of the reader's own files."""
    for pattern, stand_in in STAND_INS.items():
        command = re.sub(pattern, stand_in, command)
    return command


@contextmanager
def opened_shell(root: Path, tiny_data: Path) -> Iterator[Shell]:
    """Make the tree in an empty folder, and serve its `python` to the block's end."""
    for name in ("cache", "extract", "train_head", "evaluate", "tests", "Makefile", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    _write_small_configs(root / "configs")
    _write_small_data(tiny_data, root / "datasets")
    (root / "weights").mkdir()
    (root / "weights" / "model_final_3c8ec9.pkl").write_bytes(checkpoint_bytes("r50"))
    torch.save({"model": official_state("r50") | golden_head_state(), "iteration": 7}, root / "vita.pth")
    write_clip(root / "clip.mp4", seed=1, num_frames=4)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    write_program(programs / "torchrun", 'exec python -m torch.distributed.run "$@"')
    (programs / "ray").symlink_to(Path(sys.executable).parent / "ray")
    (programs / "activate").touch()
    (root / ".venv" / ".installed").touch()
    with served_interpreter(programs, root):
        yield Shell(root=root)


def write_program(path: Path, body: str) -> None:
    """An executable shell script."""
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def _write_small_configs(folder: Path) -> None:
    """The configs of this repository, made small, under their names."""
    shutil.copytree(ROOT / "configs", folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in folder.glob("*.yaml"):
        config = OmegaConf.merge(OmegaConf.load(path), TINY)
        if config.detector.get("short_edge", 360) is not None:
            OmegaConf.update(config, "detector", {"short_edge": 64, "architecture": None})
        OmegaConf.save(config, path)


def _write_small_data(tiny_data: Path, datasets: Path) -> None:
    """The demo's videos, and some of them as a benchmark of five categories, which is what the golden head knows."""
    shutil.copytree(tiny_data, datasets / "demo")
    write_stills(datasets / "demo", 4)
    labels: dict[str, Any] = json.loads((tiny_data / "train.json").read_text())
    labels["categories"] = labels["categories"][:5]
    for annotation in labels["annotations"]:
        annotation["category_id"] = (annotation["category_id"] - 1) % 5 + 1
    for folder, name, frames in (("ytvis_2019", "train.json", "train"), ("mine", "labels.json", "frames")):
        (datasets / folder).mkdir()
        source = "train" if frames == "train" else "train/JPEGImages"
        (datasets / folder / frames).symlink_to(datasets / "demo" / source)
        (datasets / folder / name).write_text(json.dumps(labels))
