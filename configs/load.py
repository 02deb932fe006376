"""Read a YAML and `key=value` overrides into `Settings`, refusing what cannot be meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cache.errors import ConfigError
from configs.changes import default_settings, flat
from configs.schema import DetectorEngine, Settings

CONFIG_FOLDER = Path(__file__).parent
COMMAND_LINE = "command line"
Row = tuple[str, bool, str]
"""The name of a setting (and `: ` what of it), whether its value is possible, and which would be."""

# Numbers that are more than 0, or null where that means something, and those that may be 0.
_POSITIVE = (
    "detector.num_layers", "detector.batch_frames", "head.hidden_dim", "head.mask_dim", "head.num_queries",
    "head.num_heads", "head.ffn_dim", "head.dec_layers", "loss.num_points", "loss.matching_points", "extract.workers",
    "extract.threads", "train.iterations", "train.batch_clips", "train.accumulate", "train.num_frames",
    "train.frame_range", "train.learning_rate", "train.clip_norm", "train.decay_factor", "train.log_every",
    "train.checkpoint_every", "pseudo.num_images", "pseudo.num_frames", "finetune.detector_rate", "evaluate.top_k",
    "evaluate.chunk_frames",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "pseudo.ratio", "pseudo.seed", "head.enc_layers", "head.window", "train.weight_decay", "train.warmup",
    "train.time_budget", "train.evaluate_every", "train.workers", "evaluate.report_videos", "finetune.backbone_rate",
    "loss.frame_weight", "loss.class_weight", "loss.mask_weight", "loss.dice_weight", "loss.sim_weight",
    "loss.no_object_weight",
)  # fmt: skip


def load_settings(config: str, overrides: Sequence[str] = ()) -> Settings:
    """Read a config by path or short name (`demo`, `ytvis2019_r50`) and apply `key=value` overrides.

    Raises ConfigError for an unknown key (with the nearest match), a wrong type, an impossible value, or a label file
    that the overrides name and that is not there.
    """
    path = find_config(config)
    merged: Any = default_settings()
    known = _all_keys(merged)
    overridden = _parse_overrides(overrides)
    for where, part in ((str(path), _parse_file(path)), (COMMAND_LINE, overridden)):
        if not isinstance(part, DictConfig):
            raise ConfigError("not a mapping of settings", where=where)
        _refuse_unknown_keys(part, known, where)
        try:
            merged = OmegaConf.merge(merged, _at_home(OmegaConf.to_container(part)))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(reason, where=f"{where}, setting {error.full_key or '?'}") from error
    settings = cast(Settings, OmegaConf.to_object(merged))
    origin = _Origin(str(path), frozenset(_all_keys(overridden)))
    values = flat(merged)
    _validate(settings, values, origin)
    _require_named_labels(Path(settings.data.root), values, origin)
    return settings


def find_config(config: str) -> Path:
    """Resolve a path or short name to an existing YAML file."""
    for path in (Path(config), CONFIG_FOLDER / f"{config}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
    close = difflib.get_close_matches(Path(config).stem, known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise ConfigError("no such config", where=config, hint=f"{meant}known: {', '.join(known)}")


def _parse_file(path: Path) -> object:
    try:
        return OmegaConf.load(path)
    except YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=path) from error


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is not key=value", where=COMMAND_LINE)
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=COMMAND_LINE) from error


def _at_home(given: Any) -> Any:
    """What begins with ~/, in the user's home: neither YAML nor a shell, within a word, replaces that."""
    if isinstance(given, dict):
        return {key: _at_home(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_at_home(value) for value in given]
    return str(Path.home() / given[2:]) if isinstance(given, str) and given.startswith("~/") else given


def _refuse_unknown_keys(given: DictConfig, known: Sequence[str], where: str, prefix: str = "") -> None:
    for key, value in given.items_ex(resolve=False):
        name = f"{prefix}{key!s}"
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
                candidate for candidate in known if candidate.split(".")[-1] == str(key)
            ]
            hint = f"did you mean {close[0]}?" if close else "configs/schema.py lists every setting"
            raise ConfigError(f"unknown setting '{name}'", where=where, hint=hint)
        if isinstance(value, DictConfig):
            _refuse_unknown_keys(value, known, where, f"{name}.")


def _all_keys(schema: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in schema.items_ex(resolve=False):
        keys.append(f"{prefix}{key!s}")
        if isinstance(value, DictConfig):
            keys += _all_keys(value, f"{prefix}{key!s}.")
    return keys


@dataclass(frozen=True)
class _Origin:
    """Where the value of a setting is from: the command line, or else the file."""

    file: str
    overridden: frozenset[str]

    def of(self, key: str) -> str:
        return COMMAND_LINE if key in self.overridden else self.file


def _validate(settings: Settings, values: Mapping[str, Any], origin: _Origin) -> None:
    """Refuse values, given by dotted name too, that no run could work with; ConfigError names the setting."""
    signs = [(name, values[name] is None or values[name] > 0, "more than 0") for name in _POSITIVE]
    signs += [(name, values[name] is None or values[name] >= 0, "0 or more") for name in _NOT_NEGATIVE]
    _refuse(signs, values, origin)  # Relations divide by some of them.
    _refuse([*_relations(settings), *_sources(settings)], values, origin)


def _require_named_labels(root: Path, values: Mapping[str, Any], origin: _Origin) -> None:
    """Files that a config names may be elsewhere, where a cache carries the labels; one that is typed is meant."""
    for key in ("data.train_labels", "data.valid_labels"):
        if origin.of(key) == COMMAND_LINE and values[key] is not None and not (root / values[key]).is_file():
            hint = (
                f"{key} is relative to data.root={root}; without it, stage two takes the labels that the cache carries"
            )
            raise ConfigError(f"no such label file: {root / values[key]}", where=f"{COMMAND_LINE}, {key}", hint=hint)


def _refuse(rows: Sequence[Row], values: Mapping[str, Any], origin: _Origin) -> None:
    for name, holds, expected in rows:
        key = name.partition(":")[0]
        if not holds:
            raise ConfigError(f"impossible value of {name}", where=origin.of(key), expected=expected, got=values[key])


def _relations(s: Settings) -> list[Row]:
    edge, detectron2 = s.detector.short_edge, DetectorEngine.detectron2
    edges, sides = s.finetune.short_edges, s.finetune.crop_sides
    return [
        ("name", Path(s.name).name == s.name not in ("", ".", ".."), "a folder name: runs go to <runs>/<name>"),
        ("data.holdout", 0 <= s.data.holdout < 1, "a share of the videos, 0 <= x < 1"),
        (
            "data.valid_frames",
            (s.data.valid_labels is None) == (s.data.valid_frames is None),
            "both valid_labels and valid_frames, or neither",
        ),
        ("detector.short_edge", edge is None or 32 <= edge <= 1333, "32 to 1333 pixels, or null"),
        (
            "detector.config_file",
            (s.detector.engine is detectron2) == (s.detector.config_file is not None),
            "a detectron2 YAML with detector.engine=detectron2, null with another engine",
        ),
        ("cache.min_mask_iou", 0 < s.cache.min_mask_iou <= 1, "0 < x <= 1"),
        ("cache.logit_step", 0 < s.cache.logit_step <= 1, "0 < x <= 1"),
        ("cache.identity_share", 0 < s.cache.identity_share <= 1, "0 < x <= 1"),
        ("cache.calibration_frames", s.cache.calibration_frames >= 2, "2 or more"),
        (
            "head.num_heads",
            s.head.hidden_dim % s.head.num_heads == 0,
            f"a divisor of head.hidden_dim {s.head.hidden_dim}",
        ),
        ("loss.oversample", s.loss.oversample >= 1, "1 or more candidates per point"),
        (
            "train.num_layers",
            s.train.num_layers is None or 1 <= s.train.num_layers <= s.detector.num_layers,
            f"1 to detector.num_layers {s.detector.num_layers}, or null",
        ),
        ("train.ema", 0 <= s.train.ema < 1, "a decay, 0 <= x < 1"),
        ("train.decay_steps", s.train.decay_steps == sorted(s.train.decay_steps), "increasing steps"),
        ("finetune.crop_share", 0 <= s.finetune.crop_share <= 1, "a share, 0 to 1"),
        (
            "finetune.short_edges",
            all(each >= 32 for each in edges) and bool(edges or s.finetune.crop_share == 0),
            "32 pixels or more each; [] only with finetune.crop_share=0",
        ),
        ("finetune.crop_sides", len(sides) == 2 and 0 < sides[0] <= sides[1], "the least and the largest"),
        ("finetune.resize_edges", min(s.finetune.resize_edges, default=0) > 0, "one or more, in pixels"),
        ("evaluate.keep_queries", 0 < s.evaluate.keep_queries <= 1, "0 < x <= 1"),
    ]


def _sources(s: Settings) -> list[Row]:
    """Views, pseudo-videos and mixtures."""
    views, pseudo = s.data.views, s.pseudo
    different = {(view.crop, view.crop_seed if view.crop < 1 else 0, view.short_edge, view.flip) for view in views}
    same = [v for v in views if v.crop == 1 and v.short_edge in (None, s.detector.short_edge) and not v.flip]
    in_range = "32 to 1333 pixels"
    return [
        (
            "data.views",
            not same and len(different) == len(views),
            "views that differ from each other and from the video itself",
        ),
        ("data.views: crop", all(0 < v.crop <= 1 for v in views), "a share, 0 < x <= 1"),
        ("data.views: crop_seed", all(v.crop_seed >= 0 for v in views), "0 or more"),
        (
            "data.views: short_edge",
            all(v.short_edge is None or 32 <= v.short_edge <= 1333 for v in views),
            f"{in_range}, or null",
        ),
        (
            "pseudo.labels",
            pseudo.ratio == 0 or (pseudo.labels is not None and pseudo.images is not None),
            "with pseudo.ratio > 0, a COCO instances JSON, and its folder as pseudo.images",
        ),
        ("pseudo.resize_edges", _all_in_range(pseudo.resize_edges), f"one or more, {in_range}"),
        ("pseudo.short_edges", _all_in_range(pseudo.short_edges), f"one or more, {in_range}"),
        (
            "pseudo.crop_sides",
            _all_in_range(pseudo.crop_sides)
            and len(pseudo.crop_sides) == 2
            and pseudo.crop_sides == sorted(pseudo.crop_sides),
            f"the least side and the largest, {in_range}",
        ),
        ("pseudo.rotation", 0 <= pseudo.rotation <= 90, "degrees, 0 <= x <= 90"),
        ("train.mix", all(m.ratio > 0 for m in s.train.mix), "ratios above 0"),
    ]


def _all_in_range(edges: Sequence[int]) -> bool:
    return bool(edges) and all(32 <= edge <= 1333 for edge in edges)
