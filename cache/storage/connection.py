"""Addresses of object stores, connections to them, and what goes wrong there, in words.

Credentials and endpoints come from the environment, as for every other tool (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, ...).
obstore's threads do not survive a fork: a forked process would wait for ever, and is refused instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import CacheError, first_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEME = re.compile(r"^(s3|gs|az|https?):/+")
_HINT = (
    "check the credentials and their rights (reading takes get and list, writing takes put too, pruning and replacing "
    "delete), or try again"
)
_connected: set[int] = set()
"""The process that first used obstore, once one has."""


def remote_url(path: Path | str) -> str | None:
    """The address that a path means, None for a local path. A `Path` has lost one slash of `s3://`."""
    match = SCHEME.match(str(path))
    return None if match is None else f"{match[1]}://{str(path)[match.end() :].rstrip('/')}"


def object_store(url: str) -> ObjectStore:
    """Open the store at an address. Raises CacheError where obstore is missing or refuses the address."""
    _require_obstore(url)
    require_connecting_process(url)
    from obstore.store import HTTPStore, from_url

    try:
        store: ObjectStore = from_url(url)
    except Exception as error:
        raise CacheError(f"not a usable address: {first_line(error)}", where=url) from error
    if isinstance(store, HTTPStore):
        hint = "name the object store (s3://..., with AWS_ENDPOINT for one of your own), or download an exported x.h5"
        raise CacheError("a web server does not list what it holds, so it cannot serve a cache", where=url, hint=hint)
    return store


def _require_obstore(url: str) -> None:
    if find_spec("obstore") is None:
        raise CacheError("remote caches need obstore", where=url, hint="pip install '.[remote]'")


def require_connecting_process(url: str) -> None:
    """Raise CacheError in a process that was forked from one which has used obstore."""
    if not _connected:
        _connected.add(os.getpid())
    if os.getpid() not in _connected:
        hint = "start worker processes by `forkserver` or `spawn`, not by `fork`"
        raise CacheError("the process was forked after its parent had read a remote cache", where=url, hint=hint)


@contextmanager
def in_words(where: str, what: str = "cannot be read") -> Iterator[None]:
    """Raise CacheError for what obstore raises in the block, and where it is not installed."""
    _require_obstore(where)
    import obstore

    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        raise CacheError(f"{what}: {first_line(error)}", where=where, hint=_HINT) from error
