"""A video of one's own through detector, cache and head, and the pictures drawn of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cache.errors import CacheError, ConfigError, FingerprintMismatch, FrameError, WeightsError
from cache.fingerprint import HEAD_FINGERPRINT
from cache.labels import masks
from cache.labels.masks import encode
from cache.media.footage import RECORD, look_through, write_record
from cache.reader import FeatureCache
from configs.schema import Settings
from evaluate.pictures.labelled_frames import contact_sheet, draw_labelled, enlargement
from evaluate.pictures.overlays import PALETTE, DrawnTrack
from evaluate.predict import predict
from evaluate.stage import evaluate
from extract.detector.frozen import load_detector
from extract.video import _recorded, extract_footage
from tests.cache_samples import open_writer
from tests.video_samples import write_lossless
from train_head.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent


def frames_of(settings: Settings, name: str) -> list[Path]:
    return sorted((Path(settings.data.root) / "valid" / "JPEGImages" / name).iterdir())


def run_of(settings: Settings) -> tuple[Path, str]:
    run = Path(settings.runs) / settings.name
    return run, str(run / "config.yaml")


@pytest.fixture(scope="module")
def own_video(tiny_run: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frames of validation video 1 as a lossless file, at moments of its own."""
    frames = np.stack([np.array(Image.open(path)) for path in frames_of(tiny_run, "shapes_valid_0001")])
    path = tmp_path_factory.mktemp("own") / "own.mkv"
    return write_lossless(path, frames, [0, 50, 70, 200, 210, 400], given="rgb24", stored="bgr0")


def test_a_file_a_folder_and_the_dataset_give_the_same_tracks(
    tiny_run: Settings, own_video: Path, tmp_path: Path
) -> None:
    run, config = run_of(tiny_run)
    evaluate(tiny_run)
    expected = [track for track in json.loads((run / "results.json").read_text()) if track["video_id"] == 1]
    folder = frames_of(tiny_run, "shapes_valid_0001")[0].parent
    features = extract_footage(config, [str(own_video), str(folder), f"cache.path={tmp_path}"], head=run)
    written = predict(tiny_run, run, features, tmp_path / "out", 0.0)
    assert [done.folder.name for done in written] == ["own", "shapes_valid_0001"]
    for done in written:
        tracks = json.loads((done.folder / "tracks.json").read_text())
        assert [track["category_id"] for track in tracks] == [track["category_id"] for track in expected]
        for got, wanted in zip(tracks, expected, strict=True):
            assert got["score"] == pytest.approx(wanted["score"], abs=1e-5)
            assert got["category_name"] in ("circle", "square", "triangle", "star", "cross", "ring", "arrow", "moon")
            assert got["timestamps"] == pytest.approx(done.footage.seconds)
            pairs = zip(got["segmentations"], wanted["segmentations"], strict=True)
            assert sum(differing_pixels(*pair) for pair in pairs) <= 6  # of 6 x 96 x 120, at zero logits
    assert written[0].footage.seconds == pytest.approx([0, 0.05, 0.07, 0.2, 0.21, 0.4])
    with av.open(str(written[0].folder / "overlay.mp4")) as container:
        shown = list(container.decode(video=0))
    assert [frame.time for frame in shown] == pytest.approx([0, 0.05, 0.07, 0.2, 0.21, 0.4], abs=1e-4)
    assert (shown[0].height, shown[0].width) == (5 * 96, 5 * 120)
    assert Image.open(written[0].folder / "contact_sheet.png").width > 1000


def differing_pixels(first: dict[str, object] | None, second: dict[str, object] | None) -> int:
    if first == second:
        return 0
    images = [
        np.zeros((96, 120)) if rle is None else masks.mask(masks.from_counts([rle["counts"]], 96, 120)[0])
        for rle in (first, second)
    ]
    return int((images[0] != images[1]).sum())


def test_a_kept_cache_is_continued_and_not_extracted_again(tiny_run: Settings, own_video: Path, tmp_path: Path) -> None:
    run, config = run_of(tiny_run)
    words = [str(own_video), f"cache.path={tmp_path / 'kept'}"]
    features = extract_footage(config, words, head=run)
    before = (features / "videos" / "1" / "zarr.json").stat().st_mtime_ns
    assert extract_footage(config, words, head=run, stride=1) == features
    extract_footage(config, words, head=run, stride=4)
    assert (features / "videos" / "1" / "zarr.json").stat().st_mtime_ns == before
    assert [len(done.footage.seconds) for done in predict(tiny_run, run, features, tmp_path / "out", 0.5)] == [6, 2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["own", "own-2"]


def test_what_is_complete_is_kept_and_all_else_made_anew(tiny_run: Settings, own_video: Path, tmp_path: Path) -> None:
    run, config = run_of(tiny_run)
    shutil.copytree(run, tmp_path / "head")
    head, place = tmp_path / "head", f"cache.path={tmp_path / 'kept'}"
    features = extract_footage(config, [str(own_video), place], head=head)

    def kept(settings: Settings = tiny_run, min_score: float = 0.5) -> list[bool]:
        return [done.kept for done in predict(settings, head, features, tmp_path / "out", min_score)]

    tracks = tmp_path / "out" / "own" / "tracks.json"
    assert kept() == [False]
    written = tracks.read_bytes(), tracks.stat().st_mtime_ns
    assert kept() == [True]
    extract_footage(config, [str(own_video), place], head=head, stride=4)
    assert kept() == [True, False] and kept() == [True, True]  # only what is new
    assert (tracks.read_bytes(), tracks.stat().st_mtime_ns) == written
    assert kept(min_score=0.0) == [False, False]
    fewer = replace(tiny_run, evaluate=replace(tiny_run.evaluate, top_k=1))
    assert kept(fewer, 0.0) == [False, False]
    (tmp_path / "out" / "own" / "overlay.mp4").unlink()
    assert kept(fewer, 0.0) == [False, True]
    (tmp_path / "out" / "own" / "complete.json").write_text("{")
    assert kept(fewer, 0.0) == [False, True]
    checkpoint = load_checkpoint(head / CHECKPOINT)
    save_checkpoint(head / CHECKPOINT, replace(checkpoint, seconds=checkpoint.seconds + 1))
    assert kept(fewer, 0.0) == [False, False]


@pytest.mark.parametrize("score", ["1.5", "-0.1", "50", "half", ""])
def test_scores_outside_0_to_1_are_refused_before_any_work(tiny_run: Settings, tmp_path: Path, score: str) -> None:
    words = [f"VENV={tmp_path}/venv", f"OUTPUT={tmp_path / 'out'}", f"SCORE={score}"]
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()  # without an interpreter: to call it would be another error
    done = subprocess.run(["make", "-C", str(ROOT), "predict", *words], capture_output=True, text=True, check=False)
    assert f"SCORE: not a score (expected 0 to 1, got {score})" in done.stderr
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    if score in ("1.5", "-0.1"):
        with pytest.raises(ConfigError, match=r"not a score \(expected 0 to 1"):
            predict(tiny_run, tmp_path, tmp_path, tmp_path / "out", float(score))


def test_unfinished_footage_stays_out_of_the_way(
    tiny_run: Settings, own_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for want of room, killed on the way: neither is extracted again when other footage is asked for."""
    run, config = run_of(tiny_run)
    place = f"cache.path={tmp_path / 'kept'}"
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(0))
        with pytest.raises(CacheError, match="6 frames do not fit"):
            extract_footage(config, [str(own_video), place], head=run)
    assert not (tmp_path / "kept" / "video" / RECORD).exists()
    gone = tmp_path / "gone.mkv"
    gone.write_bytes(own_video.read_bytes())
    (piece,) = look_through(gone)
    gone.unlink()
    write_record(tmp_path / "kept" / "video", [piece])
    features = extract_footage(config, [str(own_video), place], head=run, stride=4)
    assert FeatureCache.open(features).video_names() == ["2"]
    assert [done.folder.name for done in predict(tiny_run, run, features, tmp_path / "out", 0.5)] == ["own"]


def test_footage_put_down_at_the_same_time_gets_numbers_of_its_own(tiny_run: Settings, tmp_path: Path) -> None:
    settings, images = replace(tiny_run), frames_of(tiny_run, "shapes_valid_0001")
    settings.cache = replace(tiny_run.cache, ignore_space=True)
    writer, detector = open_writer(tmp_path / "cache"), load_detector(Path(settings.detector.weights))
    with ThreadPoolExecutor(len(images)) as pool:
        works = list(pool.map(lambda image: _recorded(settings, detector, writer, look_through(image)), images))
    assert sorted(name for work in works for name in work) == ["1", "2", "3", "4", "5", "6"]
    assert [work[name] for work in works for name in work] == [look_through(image)[0] for image in images]


def test_what_does_not_fit_together_is_refused_before_any_work(
    tiny_run: Settings, own_video: Path, tmp_path: Path
) -> None:
    run, config = run_of(tiny_run)
    place = f"cache.path={tmp_path / 'features'}"
    with pytest.raises(WeightsError, match="make train"):
        extract_footage(config, [str(own_video), place], head=tmp_path / "nowhere")
    with pytest.raises(FingerprintMismatch, match="short edge"):
        extract_footage(config, [str(own_video), place, "detector.short_edge=64"], head=run)
    with pytest.raises(ConfigError, match="folder"):
        extract_footage(config, [str(own_video), "cache.path=s3://bucket/x"], head=run)
    shutil.copytree(run, tmp_path / "half")
    stored = json.loads((run / HEAD_FINGERPRINT).read_text()) | {"precision": "bfloat16"}
    (tmp_path / "half" / HEAD_FINGERPRINT).write_text(json.dumps(stored))
    with pytest.raises(FingerprintMismatch, match="bfloat16 need device=cuda"):
        extract_footage(config, [str(own_video), place], head=tmp_path / "half")
    with pytest.raises(ConfigError, match=r"nothing to extract.*got 0 files"):
        extract_footage(config, [place], head=run)
    with pytest.raises(FrameError, match="no such file"):
        extract_footage(config, ["nowhere.mp4", place], head=run)
    assert not (tmp_path / "features").exists()
    with pytest.raises(CacheError, match="not a cache of videos of your own"):
        predict(tiny_run, run, Path(tiny_run.cache.path) / "valid", tmp_path, 0.3)
    features = extract_footage(config, [str(own_video), place, "detector.short_edge=64"])
    with pytest.raises(FingerprintMismatch, match="trained on other features"):
        predict(tiny_run, run, features, tmp_path, 0.3)


def test_colours_stay_with_their_tracks_and_labels_do_not_cover_each_other() -> None:
    image = np.full((90, 160, 3), 128, np.uint8)
    region = np.zeros((90, 160), bool)
    region[40:60, 50:90] = True
    here, absent = (encode(region),), (None,)
    both = [DrawnTrack(caption="a" * 8, segmentations=here), DrawnTrack(caption="b" * 8, segmentations=here)]
    drawn = draw_labelled(image, both, 0)
    scale = enlargement((90, 160))
    assert drawn.shape == (90 * scale, 160 * scale, 3) and min(drawn.shape[:2]) >= 480
    boxes = [np.argwhere((np.abs(drawn.astype(int) - colour).max(axis=-1) < 3)[: 62 * scale]) for colour in PALETTE[:2]]
    second = boxes[1]
    assert len(second) > 400  # the second label has a place of its own, though its mask lies below the first
    alone = draw_labelled(image, [DrawnTrack(caption="a", segmentations=absent), both[1]], 0)
    inside = alone[50 * scale, 70 * scale].astype(int)
    assert np.argmin([np.abs(inside - (np.array(colour) + 128) / 2).max() for colour in PALETTE]) == 1


@pytest.mark.parametrize("hw", [(1, 1), (9, 700), (700, 9), (1080, 1920)])
def test_any_size_can_be_labelled(hw: tuple[int, int]) -> None:
    everywhere = encode(np.ones(hw, bool))
    tracks = [DrawnTrack(caption="a long name 100", segmentations=(everywhere,))] * 3
    drawn = draw_labelled(np.zeros((*hw, 3), np.uint8), tracks, 0)
    assert drawn.shape[0] % hw[0] == 0 and drawn.shape[1] % hw[1] == 0 and drawn.any()


def test_contact_sheets_hold_every_picture() -> None:
    pictures = [(float(index), np.full((10, 20, 3), 40 * index, np.uint8)) for index in range(6)]
    sheet = np.asarray(contact_sheet(pictures))
    centres = [sheet[6 + 90 + row * 208, 6 + 180 + column * 366] for row in range(2) for column in range(4)]
    assert [tuple(centre) for centre in centres] == [(40 * i,) * 3 for i in range(6)] + [(255,) * 3] * 2


@pytest.mark.parametrize("status", [0, 3])
def test_make_predict_removes_its_cache_and_takes_any_name(tmp_path: Path, status: int) -> None:
    """The recipe alone, with an interpreter that writes down its words."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/words\nexit {status}\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    out = tmp_path / "out"
    words = [
        f"VENV={tmp_path}/venv",
        f"OUTPUT={out}",
        "HEAD=runs/x",
        "VIDEO=it's my clip.mp4",
        "STRIDE=2",
        "device=cpu",
    ]
    done = subprocess.run(["make", "-C", str(ROOT), "predict", *words], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is (status == 0), done.stderr
    said = (tmp_path / "words").read_text().splitlines()
    assert "it's my clip.mp4" in said and "device=cpu" in said and said.count("runs/x") == (2 if status == 0 else 1)
    assert not any(word.startswith("VIDEO") for word in said)
    assert list(out.iterdir()) == []
