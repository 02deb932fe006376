"""Addresses of object stores, connections to them, and what goes wrong there, in words.

Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, ...); ~/.aws is not read.
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
_FOREIGN = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")
_HINT = (
    "check the credentials and their rights (reading takes get and list, writing takes put too, pruning and replacing "
    "delete), or try again"
)
_REMEDIES = (
    ("NoSuchBucket|ContainerNotFound", "check the bucket's name, and the endpoint (AWS_ENDPOINT, ...)"),
    (
        r"token request|/latest/api/token|169\.254\.169\.254",
        "no usable credentials in the environment: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (~/.aws is not "
        "read), GOOGLE_APPLICATION_CREDENTIALS, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    ),
    ("builder error", "an endpoint of http:// has to be allowed: AWS_ALLOW_HTTP=true, or AZURE_..."),
    ("kind: Timeout", "a slow connection needs more than 30 seconds a request: AWS_TIMEOUT=5m, GOOGLE_..., AZURE_..."),
    ("kind: Connect", "the server cannot be reached: check the network, and the endpoint (AWS_ENDPOINT, ...)"),
)
"""What to do, by what obstore's messages hold."""
_connected: set[int] = set()
"""The process that first used obstore, once one has."""


def remote_url(path: Path | str) -> str | None:
    """The address that a path means, None for a local path. A `Path` has lost one slash of `s3://`.

    Raises CacheError for an address of another kind, which would else name a folder, and for one that ends early.
    """
    match = SCHEME.match(str(path))
    if match is None and _FOREIGN.match(str(path)):
        raise CacheError("not an address that is known", where=path, expected="s3://..., gs://... or az://...")
    if match is None:
        return None
    parts = [part for part in str(path)[match.end() :].split("/") if part]
    if any(mark in part for part in parts for mark in "?#"):
        raise CacheError("in an address, ? and # end the path", where=path, hint="name a place without them")
    return f"{match[1]}://{'/'.join(parts)}"


def local_path(path: str, what: str) -> Path:
    """The path. Raises CacheError for an address, where `what` cannot be written."""
    if remote_url(path) is not None:
        hint = "write to a local disk, and take a cache from there by `python -m cache upload FOLDER ADDRESS`"
        raise CacheError(f"{what} is not written to an address", where=path, hint=hint)
    return Path(path)


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
        raise CacheError(f"{what}: {reason(error)}", where=where, hint=_remedy(error)) from error


def lacks_bucket(error: FileNotFoundError) -> bool:
    """Whether it is the bucket that is not there, rather than an object in it."""
    return re.search(_REMEDIES[0][0], str(error)) is not None


def reason(error: Exception) -> str:
    """What the object store says, where it answers, else what obstore says."""
    match = re.search(r"<Code>(.*?)</Code>\s*<Message>([^\n<]*)", str(error))
    return first_line(error) if match is None else f"{match[2]} ({match[1]})"


def _remedy(error: Exception) -> str:
    return next((remedy for sign, remedy in _REMEDIES if re.search(sign, str(error))), _HINT)
