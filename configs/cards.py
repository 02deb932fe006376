"""README.md of every cache, run and exported detector: what it is, from what, how to use it, under which licences.

A card is for people alone: no fingerprint, checksum or comparison looks at it. Only the card of what is made with a
detector repeats the licences that the detector's own card names. Commands are those of the repository's root.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cache.layout import CARD
from configs.changes import changed_settings, in_yaml
from configs.schema import HeadKind, Settings

_LICENCES = "## Licences"
_FOOTAGE = "video"  # the split of one's own videos (extract/video.py), which has no labels
_DETECTOR = "detector"  # in the folder of a run: what it has fine-tuned (train_head/joint.py)


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
    path = shlex.quote(f"{settings.cache.path.rstrip('/')}/{split}")  # `folder` may be on its way to an object store
    if split == _FOOTAGE:
        licences = f"{_LICENCES}\n\n- videos: yours\n{_licence_of_weights(settings)}"
        use = f"`python -m evaluate predict --head RUN --output FOLDER RUN/config.yaml {path}` writes tracks,"
        use += "\nwith a run that was trained on features of this detector,"
    else:
        licences = _licences(settings)
        words = shlex.quote(f"cache.path={settings.cache.path}")
        use = f"`python -m train_head train CONFIG {words}` trains a head from it, with the config of the extraction,"
    (folder / CARD).write_text(
        f"""# Features of {settings.name}, {split}

What: frame queries and mask features of a frozen Mask2Former for every frame, format 1 of vita-cache (Zarr).

From: {source}, by the detector {settings.detector.weights}. The root's zarr.json has the fingerprint and the origin.

Use: `python -m cache inspect {path}` says what is in it, `python -m cache verify {path}` whether it is sound,
{use}
`cache.reader.FeatureCache.open(path)` reads it in Python.

{licences}
""",
        encoding="utf-8",
    )


def write_run_card(folder: Path, settings: Settings) -> None:
    """Write the card of a run, whose folder tells by a detector in it whether that was fine-tuned."""
    fine_tuned = (folder / _DETECTOR).is_dir()
    changed = "\n".join(f"    {key}={in_yaml(value)}" for key, value in changed_settings(settings).items())
    head = "a VITA head" if settings.head.kind is HeadKind.vita else f"a head of kind {settings.head.kind}"
    if not fine_tuned:
        what, source = f"{head} (checkpoint.pt)", f"features in {settings.cache.path}"
    else:
        alone = settings.finetune.frames_only
        what = "a detector (detector/)" if alone else f"{head} (checkpoint.pt) and its detector (detector/)"
        source = f"frames in {settings.data.root}"
    (folder / CARD).write_text(
        f"""# {settings.name}

What: {what}, trained with vita-cache, and what was measured of it.

From: the {source} and their labels. provenance.json has the origin, config.yaml all settings.
Those that are not the default:

{changed}

Use:

{_uses(folder, settings, fine_tuned)}

{_licences(settings)}
""",
        encoding="utf-8",
    )


def write_detector_card(folder: Path, settings: Settings) -> None:
    """Write the card of the detector that a run has fine-tuned, in the format of Hugging Face."""
    words = shlex.quote(f"detector.weights={folder}")
    (folder / CARD).write_text(
        f"""# Detector of {settings.name}

What: a Mask2Former, fine-tuned with vita-cache from {settings.detector.weights} on {settings.data.root}.

Use: `python -m extract run CONFIG {words} cache.path=FOLDER` fills a cache with it.

{_licences(settings)}
""",
        encoding="utf-8",
    )


def _uses(folder: Path, settings: Settings, fine_tuned: bool) -> str:
    run, config, elsewhere = shlex.quote(str(folder)), shlex.quote(str(folder / "config.yaml")), ""
    uses = []
    if fine_tuned:
        elsewhere = " cache.path=FOLDER"
        words = shlex.quote(f"detector.weights={folder / _DETECTOR}")
        uses.append(f"`python -m extract run {config} {words}{elsewhere}` fills a cache with its detector")
    if not (fine_tuned and settings.finetune.frames_only):
        uses.append(f"`python -m evaluate run {config}{elsewhere}` scores it")
        uses.append(f"`python -m evaluate report {config}{elsewhere}` shows it")
        uses.append(f"`make predict {shlex.quote(f'HEAD={folder}')} VIDEO=clip.mp4` applies it")
        if settings.head.kind is HeadKind.vita:
            uses.append(f"`python -m train_head export-release {run} vita.pth` gives it the names of the release")
    return "\n".join(f"- {use}" for use in uses)


def write_import_card(folder: Path, source: Path, features: Path) -> None:
    """Write the card of a run that holds the head of a released checkpoint."""
    config = shlex.quote(str(folder / "config.yaml"))
    (folder / CARD).write_text(
        f"""# {folder.name}

What: the VITA head of a released checkpoint (checkpoint.pt), imported with vita-cache.

From: {source}; to be used with the features in {features}. provenance.json has the origin, config.yaml the settings
that head and features tell: its data.* name the videos to evaluate on.

Use:

- `python -m evaluate run {config}` scores it
- `make predict {shlex.quote(f"HEAD={folder}")} VIDEO=clip.mp4` applies it

{_LICENCES}

- weights: {source.name}: licence unknown, ask where it came from
""",
        encoding="utf-8",
    )


def _licences(settings: Settings) -> str:
    pseudo = [settings.pseudo.labels] if settings.pseudo.ratio > 0 and settings.pseudo.labels else []
    data = [_first(_DATA, f"{settings.data.root} {settings.data.train_labels} {settings.name}", settings.data.root)]
    data += [_first(_DATA, labels, labels) for labels in (*pseudo, *(mix.cache for mix in settings.train.mix))]
    lines = [f"- data, as named: {words}" for words in dict.fromkeys(data)]
    return "\n".join([_LICENCES, "", _licence_of_weights(settings), *lines])


def _licence_of_weights(settings: Settings) -> str:
    """What the detector's own card says, where it has one of ours; else what its path tells."""
    weights = settings.detector.weights
    card = Path(weights) / CARD
    if card.is_file():
        inherited = card.read_text(encoding="utf-8", errors="replace").partition(_LICENCES)[2].strip()
        if inherited:
            return inherited.replace("- data", "- data that the detector was trained on")
    return f"- weights of the detector: {_first(_WEIGHTS, weights, weights)}"


def _first(known: tuple[_Licence, ...], text: str, name: str) -> str:
    """The licence of the first pattern that stands in the text as a word of its own."""
    for licence in known:
        if re.search(rf"(?<![a-z])(?:{licence.pattern})(?![a-z])", text.lower()):
            return licence.words
    return f"{name}: licence unknown, ask where it came from"
