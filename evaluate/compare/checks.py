"""Whether runs may be compared: equal videos, labels, evaluation and training length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache.errors import ConfigError
from configs.schema import CheckpointChoice
from evaluate.compare.groups import Group, described
from evaluate.compare.runs import Entry
from evaluate.stored import labels_digest


def require_pairs(groups: Sequence[Group]) -> None:
    """Raise ConfigError where runs have other videos or categories: nothing could be paired, whatever is allowed."""
    first = groups[0].entries[0]
    for entry in _entries(groups):
        for what, mine, theirs in (
            ("categories", [c.name for c in first.labels.categories], [c.name for c in entry.labels.categories]),
            ("videos", [v.id for v in first.labels.videos], [v.id for v in entry.labels.videos]),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"runs were evaluated on other {what}, so no pair can be made",
                    where=f"{first.run} ({first.split}) and {entry.run} ({entry.split})",
                    expected=f"the same {what}",
                    got=f"{len(mine)} and {len(theirs)}, of which {len(set(mine) & set(theirs))} are shared",
                    hint="evaluate both on one split: `make evaluate CONFIG=<run>/config.yaml evaluate.split=...`",
                )


def differences(groups: Sequence[Group]) -> list[str]:
    """In what, beside the thing compared, runs differ: one sentence each; empty where the terms are equal."""
    digests = {id(entry.labels): labels_digest(entry.labels) for entry in _entries(groups)}
    found = _disagreements(
        groups,
        {
            "split": lambda entry: entry.split,
            "labels (SHA-256 of their content)": lambda entry: digests[id(entry.labels)][:12],
            "evaluate.top_k": lambda entry: entry.settings.evaluate.top_k,
            "evaluate.repeats": lambda entry: entry.settings.evaluate.repeats,
            "evaluate.checkpoint": lambda entry: entry.settings.evaluate.checkpoint.value,
        },
    )
    trained = [group for group in groups if group.trained]
    found += _disagreements(trained, {"train.iterations": lambda entry: entry.settings.train.iterations})
    for entry in _entries(groups):
        found += _of_one(entry, digests[id(entry.labels)])
    for group in groups:
        found += _inside(group)
    return list(dict.fromkeys(found))


def _entries(groups: Sequence[Group]) -> list[Entry]:
    return [entry for group in groups for entry in group.entries]


def _disagreements(groups: Sequence[Group], values: dict[str, Callable[[Entry], object]]) -> list[str]:
    sentences = []
    for what, value in values.items():
        by_value: dict[object, list[str]] = {}
        for entry in _entries(groups):
            by_value.setdefault(value(entry), []).append(entry.run.name)
        if len(by_value) > 1:
            each = "; ".join(f"{value} in {', '.join(dict.fromkeys(runs))}" for value, runs in by_value.items())
            sentences.append(f"{what} differs: {each}")
    return sentences


def _of_one(entry: Entry, digest: str) -> list[str]:
    """What makes a run's numbers not what its settings say."""
    sentences = []
    iterations = entry.settings.train.iterations
    if entry.trained and 0 < entry.steps < iterations:  # an imported head has no steps
        sentences.append(f"{entry.run.name} stopped at step {entry.steps} of {iterations}")
    evaluated = entry.scored.get("step", entry.steps)
    if entry.trained and evaluated != entry.steps and entry.settings.evaluate.checkpoint is CheckpointChoice.last:
        what = f"{entry.run.name} ({entry.method}) was evaluated at step {evaluated}"
        sentences.append(f"{what} and trained to step {entry.steps} since: evaluate it again")
    if entry.scored.get("labels_sha256", digest) != digest:
        sentences.append(f"{entry.run.name} ({entry.method}) was evaluated before its labels changed")
    return sentences


def _inside(group: Group) -> list[str]:
    """Settings in which the runs of a named group differ beyond the seed."""
    first, *others = [described(entry.settings) for entry in group.entries]
    keys = sorted(key for key in first if any(other[key] != first[key] for other in others))
    return [f"the runs of {group.name} differ in {', '.join(keys)}"] if keys and group.trained else []
