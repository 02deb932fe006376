"""README.md of caches and runs: there, true, and nobody's business but people's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.errors import CacheError
from cache.layout import CARD
from cache.reader import FeatureCache
from cache.upkeep.inspection import summarise
from cache.upkeep.verification import verify_root
from cache.writer import CacheWriter
from configs.cards import write_cache_card, write_run_card
from configs.load import load_settings
from configs.schema import Settings
from tests.conftest import tiny_settings
from train_head.trainer import train


@pytest.mark.parametrize(
    ("words", "expected", "not_expected"),
    [
        (["data.root=/d/ytvis_2019"], ["YouTube-VIS: CC BY 4.0", "demo's detector: Apache-2.0"], ["OVIS"]),
        (["data.root=/d/OVIS"], ["OVIS: CC BY-NC-SA 4.0"], ["YouTube-VIS"]),
        (["data.root=/d/demo"], ["generated: Apache-2.0"], ["unknown"]),
        (["data.root=/d/provision"], ["/d/provision: licence unknown"], ["OVIS"]),  # the word, not the letters
        (["data.root=/d/x", "detector.weights=/w/model_final_3c8ec9.pkl"], ["CC BY-NC 4.0; trained on COCO"], []),
        (["data.root=/d/x", "detector.weights=/w/own.pth"], ["/w/own.pth: licence unknown"], ["Mask2Former's"]),
        (
            ["data.root=/d/ovis", "pseudo.ratio=1", "pseudo.labels=/d/coco/i.json", "pseudo.images=x"],
            ["OVIS: CC BY-NC-SA 4.0", "COCO: CC BY 4.0"],
            ["unknown"],
        ),
    ],
)
def test_licences_by_data_set(words: list[str], expected: list[str], not_expected: list[str], tmp_path: Path) -> None:
    settings = load_settings("demo", ["name=x", *words])
    for write in (write_run_card, lambda folder, chosen: write_cache_card(folder, chosen, "train", "frames")):
        write(tmp_path, settings)
        licences = (tmp_path / CARD).read_text().partition("## Licences")[2]
        assert all(word in licences for word in expected), licences
        assert not any(word in licences for word in not_expected), licences


def test_extraction_and_training_write_them(tiny_cache: Path, tiny_run: Settings) -> None:
    run = (Path(tiny_run.runs) / "tiny" / CARD).read_text()
    assert "# tiny\n" in run and "train.iterations=6" in run and str(tiny_cache) in run
    for split in ("train", "valid"):
        card = (tiny_cache / split / CARD).read_text()
        assert f", {split}\n" in card and f"cache.path={tiny_cache}" in card and "JPEGImages" in card


def test_a_card_changes_nothing_that_is_checked(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    valid = tiny_cache / "valid"
    before, own = summarise(valid), (valid / CARD).read_text()
    (valid / CARD).write_text("my own words")
    try:
        assert summarise(valid) == before and not list(verify_root(FeatureCache.open(valid)))
        train(tiny_settings(tiny_data, tiny_cache, tmp_path, "name=after", "train.iterations=1"))
    finally:
        (valid / CARD).write_text(own)
    held = FeatureCache.open(valid)
    parts = {"fingerprint": held.fingerprint, "heads": held.heads, "codec": held.codec, "labels_json": None}
    for name, refused in ((CARD, False), ("notes.txt", True)):  # a folder with a card is no foreign folder
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("x")
        if refused:
            with pytest.raises(CacheError, match=r"notes\.txt"):
                CacheWriter.open(folder, **parts)
        else:
            CacheWriter.open(folder, **parts)
