"""How far a stage is: a bar on a terminal; elsewhere, as in the log of a cluster's job, a line now and then."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Collection, Iterator
from time import monotonic
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 30.0
"""At least so long between two lines; the last one comes at the end of the stage."""

Item = TypeVar("Item")


class StageProgress:
    """Shows `total` units of work, of which `done` are done already; it is silent where nothing is left to do."""

    def __init__(self, title: str, *, unit: str, total: int, done: int = 0, shown: bool = True) -> None:
        shown = shown and total > done
        self._bar = tqdm(desc=title, unit=unit, total=total, initial=done, disable=None if shown else True)
        self._as_lines = bool(shown and self._bar.disable)  # None: tqdm looks whether standard error is a terminal.
        self._fixed = {"total": total, "initial": done, "prefix": title, "unit": unit, "ncols": 0}
        self._done, self._values = done, ""
        self._started = self._told = monotonic()

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._as_lines:
            self._print_line()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._done += count
        self._bar.update(count)
        if self._as_lines and monotonic() - self._told >= LINE_SECONDS:
            self._print_line()

    def show(self, **values: str) -> None:
        """Set what stands at the end of the line, from the next update on."""
        self._values = ", ".join(f"{name}={value}" for name, value in values.items())
        self._bar.set_postfix_str(self._values, refresh=False)

    def _print_line(self) -> None:
        self._told = monotonic()
        elapsed = self._told - self._started
        line = tqdm.format_meter(self._done, elapsed=elapsed, postfix=self._values, **self._fixed)
        print(line, file=sys.stderr, flush=True)


def with_progress(items: Collection[Item], title: str, *, unit: str) -> Iterator[Item]:
    """The items, one unit of work each."""
    with StageProgress(title, unit=unit, total=len(items)) as progress:
        for item in items:
            yield item
            progress.advance()


def say(text: str) -> None:
    """Print a line, above the bar where there is one."""
    tqdm.write(text)


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning, however often a command comes upon its cause; of several processes the main one does."""
    if is_main():
        print(f"warning: {text}")


def is_main() -> bool:
    """Whether this is the one process that speaks, where torchrun has started several."""
    return os.environ.get("RANK", "0") == "0"
