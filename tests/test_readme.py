"""README.md and docs/ tell the truth: their commands run, in their order, in a real shell (tests/readme_shell.py); they
name what there is, and no more. What is not run is listed with the reason.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from configs.changes import default_settings, flat
from tests.object_store import local_s3
from tests.readme_shell import ROOT, Shell, opened_shell, stood_in, write_program

README = (ROOT / "README.md").read_text()
TEXTS = (README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
MAKEFILE = (ROOT / "Makefile").read_text()
PACKAGES = ("configs", "extract", "cache", "train_head", "evaluate", "docs")

# Starts of commands that are not run, and why. What `make -n` and `--help` can tell of them is checked all the same.
NOT_RUN = {
    "make test": "this is a part of it",
    "make lint": ".ci/run runs it",
    "make install": ".ci/run runs it",
    "make demo-detector": "40 minutes; its result is what the demo runs",
    "make fuzz": "many minutes; test_fuzz.py runs the same tests with fewer examples",
    "make torture": "minutes; test_torture.py runs the same with fewer kills",
    "make detectron2": "compiles for minutes, from the network; the engine is tested where it is installed",
    "python -m train_head bench --device cuda": "needs CUDA; `make bench` runs the same on the CPU",
    "python -m cache bench": "`make bench` runs it",
    "python -m extract bench": "`make bench` runs it",
    "make extract extract.workers": "test_workers.py runs the same",
    "python -m evaluate bench-memory": "minutes; test_long_videos.py measures in small",
    "source .venv/bin/activate": "the shell of these tests has done so",
    "pip install": "asks the network; its extras and files are looked up below",
    "pip-audit": "asks the network; its file is looked up below",
    "kubectl": "needs Kubernetes; what it starts in the pod runs with the cluster below",
    "tensorboard": "serves until it is stopped; test_commands.py reads what it shows",
}
ON_A_CLUSTER = "make extract extract.ray_address"  # beside the Slurm script's
STATUS = {"python -m cache diff": 1}  # they differ; anything else ends with 0
PROGRAMS = ("make ", "python ", "torchrun ", "pip ", "pip-audit ", "source ", "kubectl ", "tensorboard ")


def fences() -> list[tuple[str, str]]:
    """Every fenced block: its language, and what is in it."""
    found = [fence for text in TEXTS for fence in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    return [(language, body) for language, body in found]


def code() -> tuple[list[str], list[str]]:
    """Lines of the sh blocks, without their comments, and inline code."""
    lines = [line for language, body in fences() if language == "sh" for line in body.replace("\\\n", " ").splitlines()]
    prose = (re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE) for text in TEXTS)
    inline = [part for text in prose for part in re.findall(r"`([^`]+)`", text)]
    return [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines], [" ".join(c.split()) for c in inline]


def commands() -> list[str]:
    """Every command; `make compare` in a sentence names what a line runs with its arguments."""
    lines, inline = code()
    said = [c for c in inline if c.startswith(PROGRAMS) and not c.endswith("...")]
    mentions = {c for c in said if any(other.startswith(f"{c} ") for other in (*lines, *said))}
    return [c for c in dict.fromkeys([*lines, *said]) if c and (c in lines or c not in mentions)]


HERE = [command for command in commands() if not command.startswith((*NOT_RUN, ON_A_CLUSTER))]
SCRIPTS = [body for language, body in fences() if language == "bash"]


@pytest.fixture(scope="module")
def shell(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with opened_shell(tmp_path_factory.mktemp("readme"), tiny_data) as opened:
        yield opened


def test_every_block_is_a_drawing_or_commands_of_known_programs() -> None:
    assert {language for language, _ in fences()} <= {"", "sh", "bash"}
    assert [line for line in code()[0] if line and not line.startswith(PROGRAMS)] == []


@pytest.mark.parametrize("command", HERE)
def test_every_command_runs(shell: Shell, command: str) -> None:
    with local_s3("bucket") if "s3://" in command else nullcontext():
        done = shell.run(command)
    expected = next((status for start, status in STATUS.items() if command.startswith(start)), 0)
    assert done.returncode == expected, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_commands_that_are_not_run_are_known_to_their_programs(shell: Shell) -> None:
    assert all(any(command.startswith(start) for command in commands()) for start in NOT_RUN)
    for command in commands():
        if command.startswith(tuple(NOT_RUN)) and command.startswith(("make ", "python ")):
            shown = shell.run(re.sub("^make ", "make -n ", command) if command[0] == "m" else f"{command} --help")
            assert shown.returncode == 0, f"{command}: {shown.stderr}"


def test_the_slurm_script_makes_a_cluster_that_extracts(shell: Shell, tmp_path: Path) -> None:
    """On one machine: `srun` starts each part here, `sleep` lasts until the head answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = "--num-cpus=1 --object-store-memory=80000000"
    write_program(tmp_path / "hostname", "echo 127.0.0.1")
    write_program(tmp_path / "sleep", f"until (: > /dev/tcp/127.0.0.1/{port}) 2>/dev/null; do /bin/sleep 0.2; done")
    options = 'while [[ $1 == -* ]]; do [[ $1 == -[wx] ]] && shift; shift; done; [[ $* == *--head* ]] && set -- "$@" '
    write_program(tmp_path / "srun", f'{options} --include-dashboard=false\nexec "$@" {small}')
    (script,) = SCRIPTS
    pods = [re.sub(r"^kubectl exec \S+ -- ", "", c) for c in commands() if c.startswith("kubectl")]
    (joining,) = (c for c in commands() if c.startswith(ON_A_CLUSTER))
    address = f"export RAY_ADDRESS=127.0.0.1:{port}"  # else `auto` may find that of another test on this machine
    lines = ["set -e", script.replace("6379", str(port)), address, joining, *pods]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: sockets lie in it
        environment = {**shell.environment(), "RAY_TMPDIR": folder, "HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        words = ["bash", "-c", "\n".join(map(stood_in, lines))]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(
                words, cwd=shell.root, env=environment, stdout=log, stderr=log, start_new_session=True
            ) as job,
        ):
            try:
                status = job.wait(timeout=200)
            finally:
                end_session(job.pid)
    said = (tmp_path / "log").read_text()
    assert status == 0, said[-3000:]


def end_session(session: int) -> None:
    """As Slurm ends what a job has left running."""
    deadline = time.monotonic() + 10
    while left := [process for process in Path("/proc").glob("[0-9]*") if in_session(process, session)]:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(0.2)


def in_session(process: Path, session: int) -> bool:
    try:
        return os.getsid(int(process.name)) == session and (process / "cmdline").read_bytes() != b""  # no zombie
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_extras_and_constraints_that_pip_is_told_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands():
        if command.startswith("pip"):
            extra, constraints = re.search(r"\[(\w+)\]", command), re.search(r"-[cr] (\S+)", command)
            assert extra is None or extra[1] in extras, command
            assert constraints is None or (ROOT / constraints[1]).exists(), command


def test_every_target_is_helped_with_and_in_the_readme_and_the_reverse() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)", MAKEFILE, flags=re.MULTILINE)
    assert phony is not None and targets == set(phony[1].split())
    named = {
        word for part in code() for c in part if c.startswith("make ") for word in c.split()[1:] if word in targets
    }
    first = {c.split()[1] for part in code() for c in part if c.startswith("make ")}
    assert first <= targets and named == targets - {"demo-frozen", "demo-finetuned"}  # the halves of demo-compare


OF_OTHERS = {"operator torchvision::nms does not exist"}  # PyTorch says it


def test_symptoms_are_what_commands_say() -> None:
    table = README.partition("## Something fails\n")[2].partition("\n## ")[0]
    symptoms = {code for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for code in re.findall("`(.+?)`", row)}
    source = " ".join((ROOT / path).read_text() for path in tracked_files() if path.suffix == ".py")
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that go on in the next line
    assert len(symptoms) > 10 and {symptom for symptom in symptoms - OF_OTHERS if symptom not in said} == set()


def test_settings_that_texts_name_exist() -> None:
    named = {match[1] for part in code()[1] if (match := re.match(r"([a-z]+\.\w+)(=|$)", part))}
    packages = {key.partition(".")[0] for key in flat(default_settings()) if "." in key}
    settings = {name for name in named if name.partition(".")[0] in packages and not name.endswith((".py", ".json"))}
    assert len(settings) > 20 and settings - flat(default_settings()).keys() == set()


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
    links = {link for text in TEXTS for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text)}
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
