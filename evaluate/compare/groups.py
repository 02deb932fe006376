"""Which runs are one kind, and what a kind is called: runs that differ only by seed and name are its seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from cache.errors import ConfigError
from configs.changes import WITHOUT_EFFECT, flat, is_among
from configs.schema import Settings
from evaluate.compare.runs import Entry, LabelFiles, read_entries
from evaluate.stored import HEAD

_FREE = ("name", "seed", *WITHOUT_EFFECT)  # make no other kind
_WEIGHTS = "detector.weights"  # A path: what the weights are, the fingerprint of the features knows.
_MOST_NAMED = 3  # differing settings; more than these say less than the runs' own names


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of the comparison: a method of one or more runs."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def method(self) -> str:
        """The method that made its predictions."""
        return self.entries[0].method

    @property
    def trained(self) -> bool:
        """Whether the runs' training took part."""
        return self.entries[0].trained


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Runs of one argument; `name` where the user gave one."""

    name: str | None
    entry: Entry


def read_groups(arguments: Sequence[str], methods: Sequence[str] | None = None) -> list[Group]:
    """Read runs given as folders, patterns, or `name=` with folders or patterns parted by commas.

    Heads come first, in the order given, then the other methods: the baseline where it is kept, or `methods`. A method
    without training is the same for all runs of one cache, and appears once.
    """
    label_files = LabelFiles()
    chosen: list[_Chosen] = []
    for argument in arguments:
        name, runs = runs_of(argument)
        chosen += [_Chosen(name=name, entry=e) for run in runs for e in read_entries(run, methods, label_files)]
    twice = [str(run) for run, count in _counts(chosen).items() if count > 1]
    if twice:
        raise ConfigError("a run is given twice", got=", ".join(twice))
    chosen.sort(key=lambda c: c.entry.method != HEAD)  # stable
    by_kind: dict[str, list[_Chosen]] = {}
    for item in chosen:
        by_kind.setdefault(_kind(item), []).append(item)
    kinds = [found if found[0].entry.trained else found[:1] for found in by_kind.values()]
    names = _names(kinds)
    return [
        Group(name=name, entries=tuple(item.entry for item in kind)) for name, kind in zip(names, kinds, strict=True)
    ]


def runs_of(argument: str) -> tuple[str | None, list[Path]]:
    """Split `name=run,run,pattern*`, or a pattern without a name, into the name (None) and the folders.

    A path without wildcards is returned whether it is there or not: who reads it names it. Raises ConfigError for a
    pattern that no folder matches.
    """
    name, equals, rest = argument.partition("=")
    given_name = bool(equals) and not Path(argument).exists()
    patterns = rest.split(",") if given_name else [argument]
    return (name if given_name else None), [run for pattern in patterns for run in _folders(pattern)]


def _folders(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir() or not has_magic(path.name):
        return [path]
    found = sorted(run for run in path.parent.glob(path.name) if run.is_dir())
    if not found:
        raise ConfigError("no folder matches", where=pattern, hint="name folders of runs/")
    return found


def _counts(chosen: Sequence[_Chosen]) -> dict[Path, int]:
    heads = [item.entry.run.resolve() for item in chosen if item.entry.method == chosen[0].entry.method]
    return {run: heads.count(run) for run in heads}


def _kind(item: _Chosen) -> str:
    """What two runs must share to be seeds of one kind."""
    entry = item.entry
    settings = described(entry.settings)
    settings.pop(_WEIGHTS)
    if not entry.trained:
        settings = {key: value for key, value in settings.items() if key.startswith(("data.", "evaluate."))}
    identity = item.name if item.name is not None and entry.trained else [settings, asdict(entry.fingerprint)]
    return json.dumps([entry.method, entry.split, identity], sort_keys=True)


def described(settings: Settings) -> dict[str, Any]:
    """All settings that describe a kind, flat, by dotted name."""
    return {key: value for key, value in flat(settings).items() if not is_among(key, _FREE)}


def _names(kinds: Sequence[Sequence[_Chosen]]) -> list[str]:
    """A name for each kind: the user's, or what sets it apart from the others of its method."""
    names = []
    for kind in kinds:
        first = kind[0]
        method = first.entry.method
        same_method = [other for other in kinds if other[0].entry.method == method]
        named = first.name is not None and (first.entry.trained or len(same_method) > 1)
        own = first.name if named else _apart(kind, same_method)
        names.append(own or method if method == HEAD else f"{method}, {own}" if own else method)
    repeated = {name for name in names if names.count(name) > 1}
    return [
        f"{name} ({_common_name(kind)})" if name in repeated else name for name, kind in zip(names, kinds, strict=True)
    ]


def _apart(kind: Sequence[_Chosen], kinds: Sequence[Sequence[_Chosen]]) -> str:
    """The settings in which kinds of one method differ, as they are in this one; empty for a single kind."""
    if len(kinds) == 1:
        return ""
    all_settings = [described(other[0].entry.settings) for other in kinds]
    own = described(kind[0].entry.settings)
    differing = [key for key in own if any(other.get(key) != own[key] for other in all_settings)]
    if not 0 < len(differing) <= _MOST_NAMED:
        return _common_name(kind)
    last = [key.rpartition(".")[2] for key in differing]
    short = [key if last.count(end) > 1 else end for key, end in zip(differing, last, strict=True)]
    values = [Path(str(own[key])).name if key == _WEIGHTS else own[key] for key in differing]
    return ", ".join(f"{key}={value}" for key, value in zip(short, values, strict=True))


def _common_name(kind: Sequence[_Chosen]) -> str:
    """What the runs' folder names begin with, or the first's."""
    names = [item.entry.run.name for item in kind]
    common = names[0] if len(names) == 1 else os.path.commonprefix(names).rstrip("-_.0123456789")  # noqa: RUF071
    return common or names[0]
