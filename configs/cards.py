"""README.md of every cache and every run: what it is, what it was made from, how to use it, under which licences.

A card is for people alone: no fingerprint, checksum or comparison looks at it, and nothing reads it back.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cache.layout import CARD
from configs.changes import changed_settings
from configs.schema import Settings


@dataclass(frozen=True, kw_only=True)
class _Licence:
    """Something that is recognised by a word in its path or in the config's name."""

    pattern: str
    words: str


_DATA = (
    _Licence(pattern="ovis", words="OVIS: CC BY-NC-SA 4.0"),
    _Licence(pattern="ytvis|youtube-?vis", words="YouTube-VIS: CC BY 4.0 (annotations)"),
    _Licence(pattern="coco", words="COCO: CC BY 4.0 (annotations); the images have licences of their own"),
    _Licence(pattern="demo|shapes", words="the demo's moving shapes, generated: Apache-2.0"),
)
_WEIGHTS = (
    _Licence(pattern="extract/demo/detector", words="the demo's detector: Apache-2.0"),
    _Licence(
        pattern="model_final_(?:3c8ec9|eba159|e5f453)",
        words="Mask2Former's model zoo: CC BY-NC 4.0; trained on COCO (annotations CC BY 4.0)",
    ),
)


def write_cache_card(folder: Path, settings: Settings, split: str, source: str) -> None:
    """Write the card of a cache. `source`: where the frames are from, for people."""
    (folder / CARD).write_text(
        f"""# Features of {settings.name}, {split}

What: frame queries and mask features of a frozen Mask2Former for every frame, format 1 of vita-cache (Zarr).

From: {source}, by the detector {settings.detector.weights}. The root's zarr.json has the fingerprint and the origin.

Use: `python -m cache inspect {folder.name}` (from the folder above) says what is in it, `python -m cache verify
{folder.name}` whether it is sound. `python -m train_head train CONFIG cache.path={folder.parent}` trains a head from
it, `cache.reader.FeatureCache.open(path)` reads it in Python.

{_licences(settings)}
""",
        encoding="utf-8",
    )


def write_run_card(folder: Path, settings: Settings) -> None:
    """Write the card of a run."""
    changed = "\n".join(f"    {key}={value}" for key, value in changed_settings(settings).items())
    config = shlex.quote(str(folder / "config.yaml"))
    (folder / CARD).write_text(
        f"""# {settings.name}

What: a VITA head (checkpoint.pt), trained with vita-cache, and what it scores (metrics.json, report.html).

From: the features in {settings.cache.path} and their labels. provenance.json has the origin, config.yaml all settings.
Those that are not the default:

{changed}

Use: `python -m evaluate run {config}` scores it, `python -m evaluate report {config}` shows it, `make predict
HEAD={folder} VIDEO=clip.mp4` applies it, `python -m train_head export-release {folder} vita.pth` gives it the names of
the release.

{_licences(settings)}
""",
        encoding="utf-8",
    )


def write_import_card(folder: Path, source: Path, features: Path) -> None:
    """Write the card of a run that holds the head of a released checkpoint."""
    (folder / CARD).write_text(
        f"""# {folder.name}

What: the VITA head of a released checkpoint (checkpoint.pt), imported with vita-cache.

From: {source}; to be used with the features in {features}. provenance.json has the origin.

Use: `python -m evaluate run CONFIG name={folder.name} runs={folder.parent} cache.path={features.parent}` scores it.

## Licences

- weights: {source.name}: licence unknown, ask where it came from
""",
        encoding="utf-8",
    )


def _licences(settings: Settings) -> str:
    pseudo = [settings.pseudo.labels] if settings.pseudo.ratio > 0 and settings.pseudo.labels else []
    data = [_first(_DATA, f"{settings.data.root} {settings.data.train_labels} {settings.name}", settings.data.root)]
    data += [_first(_DATA, labels, labels) for labels in (*pseudo, *(mix.cache for mix in settings.train.mix))]
    weights = _first(_WEIGHTS, settings.detector.weights, settings.detector.weights)
    lines = [f"- data, as named: {words}" for words in dict.fromkeys(data)]
    return "\n".join(["## Licences", "", f"- weights of the detector: {weights}", *lines])


def _first(known: tuple[_Licence, ...], text: str, name: str) -> str:
    """The licence of the first pattern that stands in the text as a word of its own."""
    for licence in known:
        if re.search(rf"(?<![a-z])(?:{licence.pattern})(?![a-z])", text.lower()):
            return licence.words
    return f"{name}: licence unknown, ask where it came from"
