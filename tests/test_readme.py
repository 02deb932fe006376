"""README.md tells the truth: its commands run, in its order, in a real shell; it names what there is, and no more.

The shell stands in a tree of this code with small configs and data. Its `python` forks tests/fork_server.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from extract.demo.clip import write_clip
from extract.demo.stills import write_stills
from tests.detector_samples import checkpoint_bytes, official_state
from tests.fork_server import write_interpreter
from tests.test_release import golden_head_state

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PACKAGES = ("configs", "extract", "cache", "train_head", "evaluate")

# Patterns of what stands for the reader's own files or for much work, and what is here instead.
STAND_INS = {
    r"/data/ytvis_2019": "datasets/ytvis_2019",
    r"/weights/": "weights/",
    r" CONFIG(?!=)": " demo",
    r"\bgt\.json": "datasets/demo/valid.json",
    r"\bresults\.json": "runs/demo/results.zip",
    r"seed=0,1,2(?= --jobs)": "seed=0,1",
    r"evaluate_every=\d+": "evaluate_every=2",
    r"^make bench$": "make bench SMALL=1",
    r"^(python -m evaluate max-frames .*)": r"\1 --windows 3 --kept 0.05",
    r"^make demo-compare": "make demo-compare train.iterations=2 train.decay_steps=[1]",
}

# Commands that need what is not here (more processes, a device), or minutes, and the test of what they do.
ELSEWHERE = {
    "python -m train_head bench --device cuda": "test_readme.py::test_every_command_runs",  # of `make bench`
    "make detectron2": "test_detectron2_engine.py::test_both_engines_give_the_same_features",
    "make fuzz": "test_fuzz.py::test_a_damaged_cache",
    "make torture": "test_torture.py::test_killed_stages_end_as_if_undisturbed",
    "make extract extract.workers": "test_workers.py::test_a_worker_is_killed_and_the_arrays_are_those_of_one_process",
    "make extract extract.ray_address": "test_workers.py::test_a_machine_dies_and_others_do_its_videos",
    "torchrun": "test_trainer.py::test_runs_killed_on_any_number_of_processes_go_on_with_any_other",
}
# Commands that are only read, and why.
READ = {
    "make test": "this is a part of it",
    "make lint": ".ci/run runs it",
    "make install": ".ci/run runs it",
    "make demo-detector": "minutes; its result is what the demo runs",
    "source .venv/bin/activate": "the shell of these tests has done so",
    "pip install": "its extras and files are looked up below",
}
STATUS = {"python -m cache diff": 1}  # they differ; anything else ends with 0

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


def code() -> tuple[list[str], list[str]]:
    """Lines of the sh blocks of README.md, without their comments, and its inline code."""
    lines: list[str] = []
    inline: list[str] = []
    for number, part in enumerate(re.split(r"^```", README, flags=re.MULTILINE)):
        if number % 2 == 0:
            inline += re.findall(r"`([^`]+)`", part)
        elif part.startswith("sh\n"):
            lines += part.replace("\\\n", "").splitlines()[1:]
    return [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines], [" ".join(c.split()) for c in inline]


def commands() -> list[str]:
    """Every command of README.md; `make compare` in a sentence names what a line runs with its arguments."""
    lines, inline = code()
    starts = ("make ", "python ", "torchrun ", "pip ", "source ")
    said = [c for c in inline if c.startswith(starts) and not c.endswith("...")]
    mentions = {c for c in said if any(other.startswith(f"{c} ") for other in (*lines, *said))}
    return [c for c in dict.fromkeys([*lines, *said]) if c and (c in lines or c not in mentions)]


def runs_here(command: str) -> bool:
    return not command.startswith((*ELSEWHERE, *READ))


HERE = [command for command in commands() if runs_here(command)]


def write_small_configs(folder: Path) -> None:
    """The configs of this repository, made small, under their names."""
    shutil.copytree(ROOT / "configs", folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in folder.glob("*.yaml"):
        config = OmegaConf.merge(OmegaConf.load(path), TINY)
        if config.detector.get("short_edge", 360) is not None:
            OmegaConf.update(config, "detector", {"short_edge": 64, "architecture": None})
        OmegaConf.save(config, path)


def write_small_data(tiny_data: Path, datasets: Path) -> None:
    """The demo's videos, and some of them as a benchmark of five categories, which is what the golden head knows."""
    shutil.copytree(tiny_data, datasets / "demo")
    write_stills(datasets / "demo", 4)
    (datasets / "ytvis_2019").mkdir()
    (datasets / "ytvis_2019" / "train").symlink_to(datasets / "demo" / "train")
    labels: dict[str, Any] = json.loads((tiny_data / "train.json").read_text())
    labels["categories"] = labels["categories"][:5]
    for annotation in labels["annotations"]:
        annotation["category_id"] = (annotation["category_id"] - 1) % 5 + 1
    (datasets / "ytvis_2019" / "train.json").write_text(json.dumps(labels))


@dataclass(frozen=True, kw_only=True)
class Shell:
    """A reader's shell at the repository's root, .venv activated."""

    root: Path

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        for pattern, stand_in in STAND_INS.items():
            command = re.sub(pattern, stand_in, command)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        environment |= {"PATH": f"{self.root / '.venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-c", command], cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def shell(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    root = tmp_path_factory.mktemp("readme")
    for name in ("cache", "extract", "train_head", "evaluate", "tests", "Makefile", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    write_small_configs(root / "configs")
    write_small_data(tiny_data, root / "datasets")
    (root / "weights").mkdir()
    (root / "weights" / "model_final_3c8ec9.pkl").write_bytes(checkpoint_bytes("r50"))
    torch.save({"model": official_state("r50") | golden_head_state(), "iteration": 7}, root / "vita.pth")
    write_clip(root / "clip.mp4", seed=1, num_frames=4)
    write_interpreter(root / ".venv" / "bin" / "python", root / "socket")
    (root / ".venv" / ".installed").touch()
    words = [sys.executable, "-m", "tests.fork_server", str(root / "socket")]
    with subprocess.Popen(
        words, cwd=root, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield Shell(root=root)
        server.terminate()


@pytest.mark.parametrize("command", HERE)
def test_every_command_runs(shell: Shell, command: str) -> None:
    done = shell.run(command)
    expected = next((status for start, status in STATUS.items() if command.startswith(start)), 0)
    assert done.returncode == expected, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_commands_that_run_elsewhere_are_tested_there(shell: Shell) -> None:
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
    for command in commands():
        if command.startswith("make ") and not runs_here(command):
            shown = shell.run(command.replace("make ", "make -n ", 1))
            assert shown.returncode == 0, f"{command}: {shown.stderr}"


def test_extras_and_constraints_that_pip_is_told_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands():
        if command.startswith("pip "):
            extra, constraints = re.search(r"\[(\w+)\]", command), re.search(r"-c (\S+)", command)
            assert extra is None or extra[1] in extras, command
            assert constraints is None or (ROOT / constraints[1]).exists(), command


def test_every_target_is_in_the_readme_and_the_reverse() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
    named = {c.split()[1] for part in code() for c in part if c.startswith("make ")}
    assert named == targets


def tracked_files() -> list[Path]:
    """Of the packages; without git, as from an archive, all that is there."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).exists()]
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    return [path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts]


def file_names() -> set[str]:
    """What the section "Every file" names, with its folder."""
    section = README.partition("## Every file\n")[2].partition("\n## ")[0]
    parts = re.findall(r"^\*\*((?!tests)[\w/]+)/\*\*(.*?)(?=^\*\*|\Z)", section, flags=re.DOTALL | re.MULTILINE)
    files = r"`([\w./]+\.(?:py|j2|css|js|md|json))`"
    return {f"{package}/{name}" for package, text in parts for name in re.findall(files, text)}


def test_every_file_is_named() -> None:
    sources = [path for path in tracked_files() if path.suffix in (".py", ".j2", ".css", ".js", ".md")]
    assert {path.as_posix() for path in sources if path.name != "__init__.py"} <= file_names()


def test_named_files_exist() -> None:
    links = set(re.findall(r"\]\(([^)#]+)[^)]*\)", README))
    named = file_names() | {link for link in links if not link.startswith("https://")}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


LONG: dict[str, str] = {}  # path, or path::function: why it may be one


def test_files_and_functions_are_short() -> None:
    lengths: dict[str, tuple[int, int]] = {}  # lines, and how many are allowed
    for path in tracked_files():
        if path.suffix == ".py":
            text = (ROOT / path).read_text()
            lengths[str(path)] = (len(text.splitlines()), 300)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    lengths[f"{path}::{node.name}"] = (node.end_lineno - node.lineno + 1, 60)
    too_long = {name: lines for name, (lines, allowed) in lengths.items() if lines > allowed}
    assert too_long.keys() == LONG.keys(), too_long
