"""Calibration before extraction: fitted once, shared by the splits, kept by a continued cache; and what it promises."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.codecs import codec_identity
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.rate_distortion import (
    CALIBRATION,
    Calibration,
    Distortion,
    choice_in_words,
    format_table,
    read_calibration,
    smallest_faithful,
    write_calibration,
)
from cache.detector_masks import QueryPredictions, predict_queries
from cache.errors import AnnotationError, ConfigError, CorruptData, FingerprintMismatch, FrameError
from cache.labels.annotations import load_labels
from cache.reader import FeatureCache
from cache.upkeep.inspection import verify_root, verify_video
from configs.load import load_settings
from configs.schema import Settings
from evaluate.stage import evaluate
from extract.__main__ import main as extract_main
from extract.calibration import ChosenCodec, choose_codec, draw_frames
from extract.detector.frozen import FrameDetector
from extract.distortion import DistortionMeter, JudgedFrame
from extract.stage import extract
from tests.conftest import tiny_settings
from train_head.build import decoding_of, map_channels
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.mask_folding import MapDecoding
from train_head.trainer import train

FRAMES = "cache.calibration_frames=12"


def detector_masks(feature_cache: FeatureCache, video: str) -> torch.Tensor:
    """The detector's own masks (T, 10, H, W) of its likeliest queries, by the path that training takes."""
    heads = FrozenHeads(feature_cache.heads)
    cached = feature_cache.video(video)
    channels = map_channels(feature_cache.heads)
    normed_TQC = heads.normed(torch.from_numpy(cached.frame_queries())[:, -1])
    predictions = heads.predict(normed_TQC, decoding_of(feature_cache.codec, channels))
    logits = predictions.mask_weights.logits(torch.from_numpy(cached.mask_features()))
    best = predictions.class_logits.softmax(dim=-1)[..., -1].argsort(dim=1)[:, :10]
    return torch.take_along_dim(logits, best[..., None, None], dim=1)


@pytest.fixture(scope="module")
def caches(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both splits, with each codec."""
    root = tmp_path_factory.mktemp("codec_caches")
    for codec in ("int8", "logit", "auto"):
        extract(tiny_settings(tiny_data, root / codec, root, f"cache.codec={codec}", FRAMES))
    return {codec: root / codec for codec in ("int8", "logit", "auto")}


@pytest.mark.parametrize("codec", ["int8", "logit", "auto"])
def test_masks_from_stored_features_stay_true(caches: dict[str, Path], tiny_cache: Path, codec: str) -> None:
    exact, stored = FeatureCache.open(tiny_cache / "valid"), FeatureCache.open(caches[codec] / "valid")
    ious = []
    for name in exact.video_names():
        ours, theirs = detector_masks(stored, name) > 0, detector_masks(exact, name) > 0
        union = (ours | theirs).sum(dim=(2, 3))
        ious.append(((ours & theirs).sum(dim=(2, 3)) / union)[union > 0])
        np.testing.assert_array_equal(stored.video(name).frame_queries(), exact.video(name).frame_queries())
        assert list(verify_video(stored, name)) == []
    assert torch.cat(ious).mean() > 0.97  # masks of a stride-4 map of 24 x 30: a pixel is a lot
    assert list(verify_root(stored)) == []


def test_a_logit_cache_is_a_fraction_of_the_size(caches: dict[str, Path], tiny_cache: Path) -> None:
    def map_bytes(path: Path) -> int:
        return sum(file.stat().st_size for file in path.glob("train/videos/*/mask_features/c.*"))

    assert map_bytes(caches["int8"]) < 0.51 * map_bytes(tiny_cache)
    assert map_bytes(caches["logit"]) < 0.25 * map_bytes(tiny_cache)


@pytest.mark.parametrize("codec", ["int8", "logit", "auto"])
def test_splits_share_one_fit(caches: dict[str, Path], codec: str) -> None:
    train, valid = (FeatureCache.open(caches[codec] / split) for split in ("train", "valid"))
    assert train.fingerprint == valid.fingerprint
    assert codec_identity(train.codec) == codec_identity(valid.codec) == train.fingerprint.codec
    assert (caches[codec] / "train" / CALIBRATION).read_bytes() == (caches[codec] / "valid" / CALIBRATION).read_bytes()


def test_the_measurements_are_stored(caches: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for codec, path in caches.items():
        calibration = read_calibration(path / "train")
        assert calibration is not None
        assert (calibration.fitted_frames, calibration.held_out_frames) == (8, 4)
        chosen = calibration.rows[calibration.chosen]
        assert chosen.codec == FeatureCache.open(path / "train").root.codec_name
        assert chosen.codec == codec or codec == "auto"
        assert {row.codec for row in calibration.rows} == {"float16", "int8", "logit"}
        assert all(row.encode_ms > 0 and row.decode_ms > 0 and row.bytes_per_location > 0 for row in calibration.rows)
        sizes = [row.bytes_per_frame for row in calibration.rows]
        assert sizes == sorted(sizes)
        by_step = [row for row in calibration.rows if row.codec == "logit"]
        assert all(a.logit_error > b.logit_error for a, b in pairwise(by_step))
        exact = next(row for row in calibration.rows if row.codec == "float16")
        assert exact.mask_iou > 0.995 and exact.feature_error < 1e-3
        if codec == "auto":
            assert chosen.mask_iou >= 0.99
            assert all(row.mask_iou < 0.99 for row in calibration.rows[: calibration.chosen])


def test_measured_bytes_are_those_on_disk(caches: dict[str, Path]) -> None:
    path = caches["int8"]
    calibration = read_calibration(path / "train")
    assert calibration is not None
    video = FeatureCache.open(path / "train").video("1")
    expected = video.mask_features([0]).nbytes + video.frame_queries([0]).nbytes + 8
    row = next(row for row in calibration.rows if row.codec == "int8")
    assert row.bytes_per_frame == pytest.approx(expected, rel=0.2)  # videos differ in size


def test_a_continued_cache_keeps_its_fit(tiny_data: Path, tmp_path: Path) -> None:
    extract(tiny_settings(tiny_data, tmp_path, tmp_path, "cache.codec=logit", FRAMES), only=["train"])
    before = FeatureCache.open(tmp_path / "train").fingerprint
    other = ("cache.codec=auto", "cache.calibration_frames=4", "cache.identity_share=0.5")
    extract(tiny_settings(tiny_data, tmp_path, tmp_path, *other))
    assert FeatureCache.open(tmp_path / "train").fingerprint == before
    assert FeatureCache.open(tmp_path / "valid").fingerprint == before
    float16 = tiny_settings(tiny_data, tmp_path, tmp_path, "cache.codec=float16")
    with pytest.raises(FingerprintMismatch, match=r"another codec[\s\S]*cache.codec=logit"):
        extract(float16)


def test_who_begins_second_takes_the_fit_of_the_first(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts may fit other last bits; here another setting plays the other host, which is done meanwhile."""
    settings = tiny_settings(tiny_data, tmp_path, tmp_path, "cache.codec=logit", "cache.calibration_frames=4")
    first = tiny_settings(tiny_data, tmp_path, tmp_path, "cache.codec=logit", FRAMES)

    def slow_choice(settings: Settings, detector: FrameDetector) -> ChosenCodec:
        monkeypatch.undo()
        chosen = choose_codec(settings, detector)
        extract(first, only=["valid"])
        return chosen

    monkeypatch.setattr("extract.stage.choose_codec", slow_choice)
    extract(settings)
    train, valid = (FeatureCache.open(tmp_path / split).fingerprint.codec for split in ("train", "valid"))
    assert train == valid


def test_a_borrowed_fit_lets_two_data_sets_train_one_head(
    tiny_data: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    def mixed(features: Path) -> Settings:
        mix = f"train.mix=[{{cache: {features / 'valid'}, ratio: 1.0}}]"
        return tiny_settings(tiny_data, caches["logit"], tmp_path, "cache.codec=logit", mix, "train.iterations=2")

    own = tiny_settings(tiny_data, tmp_path / "own", tmp_path, "cache.codec=logit", "cache.calibration_frames=4")
    extract(own, only=["valid"])
    with pytest.raises(FingerprintMismatch, match=f"cache.codec_from={caches['logit'] / 'train'}"):
        train(mixed(tmp_path / "own"))
    lender = f"cache.codec_from={caches['logit'] / 'train'}"
    words = ("cache.codec=logit", lender)
    extract(tiny_settings(tiny_data, tmp_path / "borrowed", tmp_path, *words), only=["valid"])
    train(mixed(tmp_path / "borrowed"))
    with pytest.raises(FingerprintMismatch, match=r"begun with another codec than that of cache.codec_from"):
        extract(tiny_settings(tiny_data, tmp_path / "own", tmp_path, *words), only=["valid"])
    with pytest.raises(FingerprintMismatch, match=r"number of stored detector layers"):
        extract(tiny_settings(tiny_data, tmp_path / "other", tmp_path, *words, "detector.num_layers=2"))


def test_frames_to_judge_codecs_on_that_cannot_be_read(tiny_data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_data, tmp_path / "data")
    video, _ = draw_frames(load_labels(root / "train.json").videos, 2)[0]
    for name in video.file_names:
        (root / "train/JPEGImages" / name).write_bytes(b"broken")
    words = ("cache.codec=auto", "cache.calibration_frames=2", "extract.skip_errors=true")
    with pytest.raises(FrameError, match=r"judged on can be read[\s\S]*cache.codec=float16"):
        extract(tiny_settings(root, tmp_path / "features", tmp_path, *words))
    words = ("cache.codec=int8", "cache.calibration_frames=4", "extract.skip_errors=true", "extract.allow_skipped=true")
    extract(tiny_settings(root, tmp_path / "features", tmp_path, *words), only=["train"])
    calibration = read_calibration(tmp_path / "features/train")
    assert calibration is not None and (calibration.fitted_frames, calibration.held_out_frames) == (2, 1)
    with pytest.raises(AnnotationError, match="no videos"):
        draw_frames([], 4)


def test_without_a_mask_to_judge_by_the_most_faithful_codec_is_taken() -> None:
    map_CHW = np.random.default_rng(0).normal(size=(4, 6, 6)).astype(np.float32)
    queries = QueryPredictions(
        embeddings_QF=np.ones((1, 4), np.float32),
        constant_Q=np.full(1, -100, np.float32),
        object_probability_Q=np.ones(1, np.float32),
    )
    frame = JudgedFrame(
        map_CHW=map_CHW,
        image_hw=(24, 24),
        logits_NHW=map_CHW.sum(axis=0, keepdims=True) - 100,
        masks_Nhw=np.zeros((1, 24, 24), bool),
        stored_queries=queries,
        query_bytes=0,
    )
    coarse = Int8(step_C=np.full(4, 0.5, np.float32), offset_C=np.zeros(4, np.float32))
    rows = []
    for codec in (coarse, Float16()):
        meter = DistortionMeter(codec, "", np.zeros(4))
        meter.add(frame)
        rows.append(meter.result())
    assert [row.mask_iou for row in rows] == [0, 0]
    assert smallest_faithful(rows, 0.99) == 1


def test_the_command_prints_the_table_and_stores_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", f"data.root={tiny_data}", f"cache.path={tmp_path / 'none'}", "device=cpu", FRAMES]
    monkeypatch.setattr("sys.argv", ["extract", "calibrate", *arguments])
    assert extract_main() == 0
    printed = capsys.readouterr().out
    assert "mask IoU" in printed and "* logit 1/64" in printed and "logit 1/128" in printed
    assert not (tmp_path / "none").exists()


def test_frames_are_spread_over_the_videos(tiny_data: Path) -> None:
    videos = load_labels(tiny_data / "train.json").videos
    drawn = draw_frames(videos, 12)
    assert drawn == draw_frames(videos, 12)
    counts = [sum(video.id == chosen.id for chosen, _ in drawn) for video in videos]
    assert sorted(counts) == [2, 2, 2, 3, 3]
    assert all(0 <= frame < video.length for video, frame in drawn)
    assert len({frame for _, frame in drawn}) > 1


def test_predictions_in_numpy_are_those_of_training(tiny_cache: Path) -> None:
    feature_cache = FeatureCache.open(tiny_cache / "train")
    queries = feature_cache.video("1").frame_queries([0, 3])
    ours = predict_queries(feature_cache.heads, queries)
    heads = FrozenHeads(feature_cache.heads)
    theirs = heads.predict(heads.normed(torch.from_numpy(queries)), MapDecoding())
    np.testing.assert_allclose(ours.embeddings_QF, theirs.mask_weights.weights_R.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours.constant_Q, theirs.mask_weights.const.numpy(), rtol=1e-3, atol=1e-3)
    objects = 1 - theirs.class_logits.softmax(dim=-1)[..., -1].numpy()
    np.testing.assert_allclose(ours.object_probability_Q, objects, atol=1e-4)


def test_a_head_serves_caches_of_other_codecs_but_is_not_trained_on(
    tiny_run: Settings, tiny_data: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / "tiny")
    other = tiny_settings(tiny_data, caches["int8"], tmp_path, "name=tiny", "cache.codec=int8")
    metrics = evaluate(other).metrics["head"]
    assert metrics is not None
    with pytest.raises(ConfigError, match=r"cache.codec was float16, now int8"):
        train(other)


# The choice


def row(codec: str, size: float, iou: float) -> Distortion:
    return Distortion(
        codec=codec,
        setting="",
        stored_channels=1,
        bytes_per_frame=size,
        feature_error=0.1,
        logit_error=0.1,
        mask_iou=iou,
        mask_iou_p5=iou,
        encode_ms=1,
        decode_ms=1,
    )


ROWS = (row("a", 10, 0.95), row("b", 20, 0.991), row("c", 30, 0.985), row("d", 40, 0.999))


@pytest.mark.parametrize(("threshold", "expected"), [(0.9, 0), (0.99, 1), (0.995, 3), (1.0, 3)])
def test_the_smallest_faithful_codec_is_chosen(threshold: float, expected: int) -> None:
    assert smallest_faithful(ROWS, threshold) == expected


@pytest.mark.parametrize(
    ("chosen", "threshold", "automatic", "words"),
    [
        (1, 0.99, True, r"^codec: b, the smallest that keeps 0.99 \(mean mask IoU 0.9910 on 4 held-out frames"),
        (3, 1.0, True, r"^warning: NO CODEC keeps cache.min_mask_iou=1; the most faithful one is taken: d \(.*0.9990"),
        (0, 0.99, False, r"^codec: a, as cache.codec says \(.*0.9500"),
    ],
)
def test_the_choice_is_told_in_words(chosen: int, threshold: float, automatic: bool, words: str) -> None:
    calibration = Calibration(rows=ROWS, chosen=chosen, min_mask_iou=threshold, fitted_frames=8, held_out_frames=4)
    assert re.search(words, choice_in_words(calibration, automatic))


def test_an_extraction_says_which_codec_it_takes_and_why(
    tiny_data: Path, caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = ("cache.codec=auto", "cache.calibration_frames=4", "cache.min_mask_iou=1")
    extract(tiny_settings(tiny_data, tmp_path / "impossible", tmp_path, *impossible), only=["valid"])
    said = capsys.readouterr().out
    assert "warning: NO CODEC keeps cache.min_mask_iou=1; the most faithful one is taken: " in said
    extract(tiny_settings(tiny_data, caches["int8"], tmp_path, "cache.codec=int8"))
    assert re.search(r"codec: int8, with which .*train was begun", capsys.readouterr().out)


def test_the_table_survives_the_disk(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    calibration = Calibration(rows=ROWS, chosen=1, min_mask_iou=0.99, fitted_frames=8, held_out_frames=4)
    write_calibration(tmp_path, calibration)
    assert read_calibration(tmp_path) == calibration
    assert [line[0] for line in format_table(calibration).splitlines()[2:]] == [" ", "*", " ", " "]
    (tmp_path / CALIBRATION).write_text('{"rows": [{}]}')
    with pytest.raises(CorruptData, match="calibration"):
        read_calibration(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "cache.codec=int4",
        "cache.min_mask_iou=1.5",
        "cache.logit_step=0",
        "cache.identity_share=0",
        "cache.calibration_frames=1",
    ],
)
def test_impossible_codec_settings_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_settings("demo", [override])
