"""Which detector categories mean which categories of the labels, when the detector learnt another set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache as memoised
from pathlib import Path

from cache.labels.tracks import Category


def category_pairs(categories: Sequence[Category], detector_names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (class index of the labels, class index of the detector).

    Equal names where the detector knows them all, as one fine-tuned on the data set does; else the COCO tables of
    YouTube-VIS 2019, 2021 and OVIS where the labels are one of these sets; else equal names. Categories without a
    counterpart are in no pair.
    """
    detector_index = {_plain(name): index for index, name in enumerate(detector_names)}
    table = [(_plain(category.name), category.id) for category in categories]
    if not all(name in detector_index for name, _ in table):
        table = _published_table(tuple(sorted((id_, name) for name, id_ in table))) or table
    label_index = {category.id: index for index, category in enumerate(categories)}
    return [(label_index[id_], detector_index[name]) for name, id_ in table if name in detector_index]


@memoised
def _published_tables() -> list[list[tuple[str, int, str]]]:
    """Return, per data set, (COCO name, category id, category name)."""
    stored = json.loads((Path(__file__).parent / "category_maps.json").read_text())
    return [[(_plain(r["coco_name"]), r["id"], _plain(r["name"])) for r in rows] for rows in stored.values()]


def _published_table(categories: tuple[tuple[int, str], ...]) -> list[tuple[str, int]] | None:
    known = set(categories)
    for rows in _published_tables():
        if {(id_, name) for _, id_, name in rows} <= known:
            return [(coco, id_) for coco, id_, _ in rows]
    return None


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").strip()
