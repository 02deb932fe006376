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
from cache.codecs.rate_distortion import (
    CALIBRATION,
    read_calibration,
)
from cache.errors import ConfigError, FingerprintMismatch
from cache.reader import FeatureCache
from cache.upkeep.verification import verify_root, verify_video
from configs.schema import Settings
from evaluate.report.write import write_report
from evaluate.stage import evaluate
from extract.__main__ import main as extract_main
from extract.calibration import ChosenCodec, choose_codec
from extract.detector.frozen import FrameDetector
from extract.detector_masks import predict_queries
from extract.stage import extract
from tests.conftest import tiny_settings
from train_head.build import decoding_of, map_channels
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.frame_losses import frame_normalisers
from train_head.trainer import train

FRAMES = "cache.calibration_frames=12"
CODECS = ("int8", "logit", "spectral", "auto")


def detector_masks(feature_cache: FeatureCache, video: str) -> torch.Tensor:
    """The detector's own masks (T, 10, H, W) of its likeliest queries, by the path that training takes."""
    heads = FrozenHeads(feature_cache.heads)
    cached = feature_cache.video(video)
    channels = map_channels(feature_cache.heads)
    normed_TQC = heads.normed(torch.from_numpy(cached.frame_queries())[:, -1])
    decoding = decoding_of(feature_cache.codec, channels)
    predictions = heads.predict(normed_TQC, decoding)
    maps_TRHW = decoding.expand(torch.from_numpy(cached.mask_features()), cached.attributes.map_hw)
    logits = predictions.mask_weights.logits(maps_TRHW)
    best = predictions.class_logits.softmax(dim=-1)[..., -1].argsort(dim=1)[:, :10]
    return torch.take_along_dim(logits, best[..., None, None], dim=1)


@pytest.fixture(scope="module")
def caches(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both splits, with each codec."""
    root = tmp_path_factory.mktemp("codec_caches")
    for codec in CODECS:
        extract(tiny_settings(tiny_data, root / codec, root, f"cache.codec={codec}", FRAMES))
    return {codec: root / codec for codec in CODECS}


@pytest.mark.parametrize("codec", CODECS)
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


@pytest.mark.parametrize("codec", CODECS)
def test_splits_share_one_fit(caches: dict[str, Path], codec: str) -> None:
    train, valid = (FeatureCache.open(caches[codec] / split) for split in ("train", "valid"))
    assert train.fingerprint == valid.fingerprint
    assert codec_identity(train.codec) == codec_identity(valid.codec) == train.fingerprint.codec
    assert (caches[codec] / "train" / CALIBRATION).read_bytes() == (caches[codec] / "valid" / CALIBRATION).read_bytes()


def test_the_measurements_are_stored(caches: dict[str, Path]) -> None:
    for codec, path in caches.items():
        calibration = read_calibration(path / "train")
        assert calibration is not None
        assert (calibration.fitted_frames, calibration.held_out_frames) == (8, 4)
        chosen = calibration.rows[calibration.chosen]
        assert chosen.codec == FeatureCache.open(path / "train").root.codec_name
        assert chosen.codec == codec or codec == "auto"
        assert {row.codec for row in calibration.rows} == {"float16", "int8", "logit", "spectral"}
        assert all(row.encode_ms > 0 and row.decode_ms > 0 and row.bytes_per_location > 0 for row in calibration.rows)
        sizes = [row.bytes_per_frame for row in calibration.rows]
        assert sizes == sorted(sizes)
        for name in ("logit", "spectral"):
            by_step = [row for row in calibration.rows if row.codec == name]
            assert all(a.logit_error > b.logit_error for a, b in pairwise(by_step))
        exact = next(row for row in calibration.rows if row.codec == "float16")
        assert exact.mask_iou > 0.995 and exact.feature_error < 1e-3
        if codec == "auto":
            wanted = calibration.min_mask_iou
            assert chosen.mask_iou >= wanted
            assert all(row.mask_iou < wanted for row in calibration.rows[: calibration.chosen])


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


def test_the_command_prints_the_table_and_stores_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", f"data.root={tiny_data}", f"cache.path={tmp_path / 'none'}", "device=cpu", FRAMES]
    monkeypatch.setattr("sys.argv", ["extract", "calibrate", *arguments])
    assert extract_main() == 0
    printed = capsys.readouterr().out
    assert "mask IoU" in printed and "* spectral 1/128" in printed and "logit 1/64" in printed
    assert not (tmp_path / "none").exists()


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


@pytest.mark.parametrize("codec", ["logit", "spectral"])
def test_training_sees_what_the_codec_decodes(
    tiny_data: Path, caches: dict[str, Path], tmp_path: Path, codec: str
) -> None:
    settings = tiny_settings(tiny_data, caches[codec], tmp_path, f"cache.codec={codec}")
    source = CachedSource(settings, open_training_set(settings), torch.device("cpu"))
    clip = source.clips().read(0, np.empty)
    targets = source.targets(clip)
    features = source.features([clip], [targets], frame_normalisers([targets], 1, 0.1))
    seen_TCHW = torch.einsum("cr,trhw->tchw", source.decoding.matrix_CR, features.maps[0].float())
    seen_TCHW += source.decoding.mean_C[:, None, None]
    cached = source.videos.feature_cache.video(clip.key.partition("/")[2])
    expected = source.videos.codec.decode(cached.mask_features(clip.frames), cached.attributes.map_hw)
    np.testing.assert_allclose(seen_TCHW.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert (train(settings) / "checkpoint.pt").exists()


def test_a_head_serves_caches_of_other_codecs_but_is_not_trained_on(
    tiny_run: Settings, tiny_data: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / "tiny")
    other = tiny_settings(tiny_data, caches["spectral"], tmp_path, "name=tiny", "cache.codec=spectral")
    metrics, exact = evaluate(other).metrics["head"], evaluate(tiny_run).metrics["head"]
    assert metrics is not None and exact is not None and metrics.AR10 is not None and exact.AR10 is not None
    assert abs(metrics.AR10 - exact.AR10) <= 2
    with pytest.raises(ConfigError, match=r"cache.codec was float16, now spectral"):
        train(other)
    page = write_report(other).read_text()
    calibration = read_calibration(caches["spectral"] / "valid")
    assert calibration is not None and "mask IoU lost</text>" in page
    assert page.count("(used)</th>") == 1
    for row in calibration.rows:
        found = re.search(
            rf'<th scope="row">{re.escape(row.label)}(?: \(used\))?</th>((?:<td>[\d.,]+</td>)+)</tr>', page
        )
        assert found is not None, row.label
        shown = [float(cell.replace(",", "")) for cell in re.findall(r"<td>(.*?)</td>", found[1])]
        expected = [row.bytes_per_frame, row.bytes_per_location, row.feature_error, row.logit_error]
        expected += [row.mask_iou, row.mask_iou_p5, row.encode_ms, row.decode_ms]
        assert shown == pytest.approx(expected, abs=0.51)
        assert shown[2:] == pytest.approx(expected[2:], abs=0.0051)


def test_an_extraction_says_which_codec_it_takes_and_why(
    tiny_data: Path, caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = ("cache.codec=auto", "cache.calibration_frames=4", "cache.min_mask_iou=1")
    extract(tiny_settings(tiny_data, tmp_path / "impossible", tmp_path, *impossible), only=["valid"])
    said = capsys.readouterr().out
    assert "warning: NO CODEC keeps cache.min_mask_iou=1; the most faithful one is taken: " in said
    assert "encode ms" in said and "* float16" in said  # the table, without being asked
    extract(tiny_settings(tiny_data, caches["int8"], tmp_path, "cache.codec=int8"))
    assert re.search(r"codec: int8, with which .*train was begun", capsys.readouterr().out)
