"""A trained head and what it belongs to: its features, its categories, the file that it is exported to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cache.errors import FingerprintMismatch
from configs.schema import Settings
from evaluate.stage import score_head
from tests.conftest import tiny_settings
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.trainer import train


def test_a_head_is_refused_where_its_numbers_mean_other_categories(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    """As a head of YouTube-VIS 2019 on labels of 2021: as many categories, in another order."""
    features = tmp_path / "features"
    shutil.copytree(tiny_cache, features)
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / tiny_run.name)
    for split in ("train", "valid"):
        path = features / split / "annotations.json"
        labels = json.loads(path.read_text())
        first, second = labels["categories"][1:3]
        first["name"], second["name"] = second["name"], first["name"]
        path.write_text(json.dumps(labels))
    settings = tiny_settings(tiny_data, features, tmp_path, "name=tiny")
    for use in (score_head, train):
        with pytest.raises(FingerprintMismatch, match=r"other categories(.|\n)*number 2 \(expected 'square', of 8"):
            use(settings)
    checkpoint = load_checkpoint(tmp_path / tiny_run.name / CHECKPOINT)
    with pytest.raises(FingerprintMismatch, match=r"number 9 .*'none', of 8, got 'owl', of 9"):
        checkpoint.require_categories([*checkpoint.category_names, "owl"], tmp_path)
