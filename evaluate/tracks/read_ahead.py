"""An iterator that works in a thread of its own, ahead of its reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the same items, each made while the reader works on the one before: two are in memory at a time.

    What the iterator raises is raised here. Gradients are a setting of the thread: the iterator has to turn them off
    itself.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, iterator, None)
            yield item
