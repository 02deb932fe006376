"""`python -m MODULE ...` as a fresh process without the seconds of importing PyTorch: forked from one that has it.

`served_interpreter` writes a `python` that hands its words, folder, environment and standard streams to the server.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
_MESSAGE = 100_000  # bytes of words and environment at most
_PRELOADED = (
    *("cache.__main__", "extract.stage", "train_head.trainer", "train_head.joint", "torch.utils.tensorboard"),
    *("evaluate.stage", "evaluate.predict", "evaluate.compare.report", "evaluate.report.write"),
)


@contextmanager
def served_interpreter(folder: Path, root: Path = ROOT) -> Iterator[Path]:
    """`python` in a folder, and its server, to the block's end: it runs the code in `root`."""
    python, address = folder / "python", folder / "socket"
    _write_interpreter(python, address)
    words = [sys.executable, "-m", "tests.fork_server", str(address)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield python
        server.terminate()


def _write_interpreter(path: Path, address: Path) -> None:
    own = f"{shlex.quote(sys.executable)}"
    ask = f"{own} -IS {shlex.quote(__file__)} {shlex.quote(str(address))}"
    path.write_text(
        f'#!/bin/sh\n[ "$1" != -u ] || shift\n[ "$1" = -m ] || exec {own} "$@"\nshift\nexec {ask} "$0" "$@"\n'
    )
    path.chmod(0o755)


def ask(address: str, interpreter: str, words: list[str]) -> int:
    """Have the server run the words; the exit status."""
    request = json.dumps([os.getcwd(), interpreter, words, dict(os.environ)]).encode()  # noqa: PTH109  # no pathlib yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        socket.send_fds(connection, [request], [0, 1, 2])
        return int(connection.recv(16) or b"1")  # nothing: it was killed


def serve(address: str) -> None:
    """Import once, then fork for every request."""
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # else every child would look through, and so copy, what is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                status = _run(connection)
                connection.send(str(status).encode())
                os._exit(status)
            connection.close()


def _run(connection: socket.socket) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, _MESSAGE, 3)
    folder, interpreter, words, environment = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable, sys.argv = interpreter, words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2], sys.argv[3:]))
