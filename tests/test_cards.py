"""README.md of caches and runs: there, true, and nobody's business but people's."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import CacheError
from cache.layout import CARD
from cache.reader import FeatureCache
from cache.upkeep.inspection import summarise
from cache.upkeep.verification import verify_root
from cache.writer import CacheWriter
from configs.cards import write_cache_card, write_detector_card, write_run_card
from configs.load import load_settings
from configs.schema import Settings
from extract.demo.clip import write_clip
from extract.video import extract_footage
from tests.conftest import tiny_settings
from train_head.trainer import train

ROOT = Path(__file__).parent.parent


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
    (tmp_path / "run").mkdir()
    (tmp_path / "cache").mkdir()
    write_run_card(tmp_path / "run", settings)
    write_cache_card(tmp_path / "cache", settings, "train", "frames")
    for folder in ("run", "cache"):
        licences = (tmp_path / folder / CARD).read_text().partition("## Licences")[2]
        assert all(word in licences for word in expected), licences
        assert not any(word in licences for word in not_expected), licences


def test_extraction_and_training_write_them(tiny_cache: Path, tiny_run: Settings) -> None:
    run = (Path(tiny_run.runs) / "tiny" / CARD).read_text()
    assert (
        "# tiny\n" in run
        and "train.iterations=6" in run
        and "detector.short_edge=null\n" in run
        and str(tiny_cache) in run
    )
    for split in ("train", "valid"):
        card = (tiny_cache / split / CARD).read_text()
        assert f", {split}\n" in card and f"cache.path={tiny_cache}" in card and "JPEGImages" in card


def test_what_is_made_with_a_fine_tuned_detector_carries_its_licences_on(tmp_path: Path) -> None:
    detector = tmp_path / "own" / "detector"
    detector.mkdir(parents=True)
    weights = "detector.weights=/w/model_final_3c8ec9.pkl"
    write_detector_card(detector, load_settings("demo_finetune", ["data.root=/d/ovis", "name=own", weights]))
    settings = load_settings("demo", ["data.root=/d/ytvis_2019", "name=x", f"detector.weights={detector}"])
    write_cache_card(tmp_path, settings, "train", "frames")
    licences = (tmp_path / CARD).read_text().partition("## Licences")[2]
    assert "weights of the detector: Mask2Former's model zoo: CC BY-NC 4.0" in licences
    assert "data that the detector was trained on, as named: OVIS: CC BY-NC-SA" in licences
    assert "- data, as named: YouTube-VIS: CC BY 4.0" in licences and "unknown" not in licences


def test_cards_offer_what_a_run_can_do(tmp_path: Path) -> None:
    for word, fine_tuned, offered, refused in (
        ("head.kind=vita", False, ["a VITA head", "export-release", "evaluate run"], ["extract run", "detector/"]),
        ("head.kind=gru", False, ["a head of kind gru", "make predict"], ["VITA", "export-release"]),
        ("head.kind=vita", True, ["and its detector", "export-release", "extract run"], []),
        ("finetune.frames_only=true", True, ["a detector (", "extract run"], ["head (", "evaluate", "predict"]),
    ):
        run = tmp_path / f"{word}{fine_tuned}"
        (run / "detector" if fine_tuned else run).mkdir(parents=True)
        write_run_card(run, load_settings("demo", ["name=x", word]))
        card = (run / CARD).read_text()
        assert all(words in card for words in offered) and not any(words in card for words in refused), card


def run_commands(card: Path, **stand_ins: str) -> list[str]:
    """Run every command in backticks, in this process; returns them."""
    commands = [" ".join(code.split()) for code in re.findall(r"`((?:python|make) [^`]*)`", card.read_text())]
    for command in commands:
        words = [
            stand_ins[word]
            if word in stand_ins
            else word.replace("FOLDER", stand_ins["FOLDER"]).replace("RUN", stand_ins["RUN"])
            for word in shlex.split(command)
        ]
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ending:
            patch.setattr(sys, "argv", [words[2], *words[3:]])
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        assert ending.value.code == 0, command
    return commands


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy
def test_their_commands_run(tiny_cache: Path, tiny_run: Settings, tmp_path: Path) -> None:
    """In folders whose names a shell would part; a fine-tuned run's detector is the demo's own."""
    run, footage = tmp_path / "my runs" / "tiny", tmp_path / "own video"
    shutil.copytree(Path(tiny_run.runs) / "tiny", run)
    config, elsewhere = run / "config.yaml", tmp_path / "my cache"
    settings = load_settings(str(config))
    stand_ins = {
        "RUN": str(run),
        "CONFIG": str(config),
        "vita.pth": str(tmp_path / "vita.pth"),
        "FOLDER": str(elsewhere),
    }
    commands = run_commands(tiny_cache / "train" / CARD, **stand_ins)
    write_run_card(run, settings)
    commands += run_commands(run / CARD, **stand_ins)
    write_clip(tmp_path / "clip.mp4", seed=0, num_frames=2)
    extract_footage(str(config), [str(tmp_path / "clip.mp4"), f"cache.path={footage}"])
    commands += run_commands(footage / "video" / CARD, **stand_ins)
    (run / "detector").symlink_to(ROOT / "extract" / "demo" / "detector")
    settings.finetune.frames_only = True
    write_run_card(run, settings)
    commands += run_commands(run / CARD, **stand_ins)
    assert len(commands) == 3 + 4 + 3 + 1


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
