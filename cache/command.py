"""What every command line shares: `-v`, errors as one line and a hint, Ctrl-C answered with how to go on."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cache.errors import VideoBusy, VitaCacheError, first_line
from cache.progress import is_main

INTERRUPTED = 130
BUSY = 75  # EX_TEMPFAIL of sysexits.h
_TYPED = "MAKE_TYPED"  # environment variable: the words of the `make` command that started this one (Makefile)

PART_OF = "PART_OF_A_COMMAND"
"""Environment variable, set: another command started this one, says how to go on, and does not outlive it."""
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def add_verbose(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Give every verb `-v`."""
    for verb in verbs.choices.values():
        verb.add_argument("-v", "--verbose", action="store_true", help="say more; errors with their traceback")


def run_command(command: Callable[[], int], *, verbose: bool = False) -> int:
    """Run a command and return its exit status: 2 for what users can mend, 1 for a bug, 130 where it was stopped.

    75 is not an error of this process: others write what it wants, so that it is to be run again when they have ended.

    Errors are one line and a hint; `verbose` adds the traceback, and what is logged below the level of a warning.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    if PART_OF in os.environ and sys.platform == "linux":  # SIGTERM when what started this ends, however it does
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        with _stopped_by_sigterm():
            return command()
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        return 0
    except KeyboardInterrupt:
        if is_main() and PART_OF not in os.environ:
            print(f"stopped; to go on: {_own_command()}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if verbose:
            traceback.print_exc()
        print(f"{_red('error:')} {_in_words(error)}", file=sys.stderr)
        if isinstance(error, VideoBusy):
            return BUSY
        return 2 if isinstance(error, VitaCacheError | OSError) else 1


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Within, a cluster's SIGTERM does what Ctrl-C does: nothing temporary is left."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _own_command() -> str:
    if _TYPED in os.environ:
        words = re.split(r"(?<!\\) ", os.environ[_TYPED].strip())  # make writes a space within a word as "\ "
        return shlex.join(word.replace("\\ ", " ") for word in words)
    return "the same torchrun command" if "TORCHELASTIC_RUN_ID" in os.environ else shlex.join(sys.orig_argv)


def _in_words(error: Exception) -> str:
    if isinstance(error, VitaCacheError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    reason = " ".join(first_line(error).split())
    louder = "V=1" if _TYPED in os.environ else "-v"
    hint = f"not a mistake of yours: the same command with {louder} shows where, for a bug report"
    return f"{type(error).__name__}: {reason}\n  hint: {hint}"


def _red(text: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[31m{text}\033[0m"
