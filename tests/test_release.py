"""Released VITA checkpoints: into our pipeline, through it, and back out bit for bit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cache.codecs.float16 import Float16
from cache.fingerprint import sha256_file
from cache.heads import HEAD_SHAPES, DetectorHeads
from cache.layout import VideoAttributes
from cache.writer import CacheWriter
from configs.load import load_settings
from configs.schema import Settings
from evaluate.compare.checks import differences
from evaluate.compare.groups import read_groups
from evaluate.compare.runs import LabelFiles, read_entries
from evaluate.predict import predict
from evaluate.stage import evaluate
from extract.detector.frozen import load_detector
from extract.stage import extract
from extract.video import extract_footage
from tests.cache_samples import FINGERPRINT, labels_of
from tests.detector_samples import golden_arrays, key_shapes, official_state, write_checkpoint
from tests.test_head_parity import GOLDEN as HEAD_GOLDEN
from tests.test_head_parity import golden_config, golden_head
from train_head.__main__ import main
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.heads.vita import RELEASE_PREFIX
from train_head.run_folder import CONFIG
from train_head.trainer import train

ORIGINAL_HW, TOP_K = (90, 160), 10
LENGTHS = {1: 3, 2: 1}
HEAD_SETTINGS = ("mask_dim=64", "hidden_dim=64", "num_queries=15", "ffn_dim=128", "enc_layers=3", "dec_layers=6")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train_head", *map(str, arguments)])
    return main()


def golden_head_state() -> dict[str, Tensor]:
    with np.load(HEAD_GOLDEN / "state.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def tensors_in(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True)["model"])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differing
    assert all(actual[name].dtype == tensor.dtype for name, tensor in expected.items())


def write_videos(root: Path) -> None:
    """A video of three frames and one of a single frame, one labelled box in each, five categories."""
    image = golden_arrays("r50", "inputs.npz")["image0"]
    content = json.loads(labels_of(LENGTHS))
    for video in content["videos"]:
        video |= {"height": ORIGINAL_HW[0], "width": ORIGINAL_HW[1]}
        video["file_names"] = [name.replace(".jpg", ".png") for name in video["file_names"]]
        for shift, name in enumerate(video["file_names"]):
            path = root / "frames" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(image, 7 * shift + 30 * video["id"], axis=1)).save(path)
    box = {"size": list(ORIGINAL_HW), "counts": [20 * 90, 900, 150 * 90 - 20 * 90 - 900, 900]}
    box["counts"].append(90 * 160 - sum(box["counts"]))
    content["annotations"] = [
        {
            "id": video_id,
            "video_id": video_id,
            "category_id": 2 * video_id,
            "iscrowd": 0,
            "segmentations": [box] * length,
            "areas": [1800] * length,
            "bboxes": [[20, 0, 140, 90]] * length,
        }
        for video_id, length in LENGTHS.items()
    ]
    content["categories"] = [{"id": index + 1, "name": f"kind {index}"} for index in range(5)]
    (root / "labels.json").write_text(json.dumps(content))


class Release:
    """A whole VITA checkpoint of tiny sizes, and a cache that was extracted with the detector in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "vita.pth"
        self.tensors = official_state("r50") | golden_head_state()
        torch.save({"model": self.tensors, "iteration": 7}, self.file)
        write_videos(root)
        extract(self.settings())

    @property
    def features(self) -> Path:
        return self.root / "cache" / "train"

    def settings(self, *overrides: str) -> Settings:
        return load_settings(
            "demo",
            [
                f"data.root={self.root}",
                *("data.train_labels=labels.json", "data.train_frames=frames"),
                *("data.valid_labels=null", "data.valid_frames=null"),
                *(f"detector.weights={self.file}", "detector.short_edge=null", "device=cpu", "cache.codec=float16"),
                *(f"cache.path={self.root / 'cache'}", f"runs={self.root / 'runs'}", "evaluate.split=train"),
                *(f"head.{setting}" for setting in HEAD_SETTINGS),
                *("loss.num_points=32", "train.iterations=2", "train.batch_clips=2", "train.num_frames=2"),
                *overrides,
            ],
        )


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("release"))


def import_arguments(release: Release, name: str) -> list[object]:
    return ["import-release", release.file, "--output", release.root / "runs" / name, "--cache", release.features]


def test_sizes_are_read_from_the_shapes(
    release: Release, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *import_arguments(release, "sizes")) == 0
    assert "this very file" in capsys.readouterr().out
    checkpoint = load_checkpoint(release.root / "runs/sizes" / CHECKPOINT)
    assert checkpoint.config == golden_config()
    assert checkpoint.fingerprint.weights_sha256 == sha256_file(release.file)
    assert checkpoint.category_names == tuple(f"kind {index}" for index in range(5))
    assert run(monkeypatch, *import_arguments(release, "sizes")) == 2  # never over a head that is there


def test_export_gives_back_every_bit(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *import_arguments(release, "back"))
    folder = release.root / "runs" / "back"
    assert run(monkeypatch, "export-release", folder, tmp_path / "whole.pth", "--detector", release.file) == 0
    assert_same(tensors_in(tmp_path / "whole.pth"), release.tensors)
    assert run(monkeypatch, "export-release", folder, tmp_path / "head.pth") == 0
    assert_same(tensors_in(tmp_path / "head.pth"), golden_head_state())
    zoo = write_checkpoint("r50", tmp_path)
    assert run(monkeypatch, "export-release", folder, tmp_path / "joined.pth", "--detector", zoo) == 0
    assert_same(tensors_in(tmp_path / "joined.pth"), release.tensors)


@pytest.mark.parametrize(("sizes", "layers"), [("vita_r50_enc6dec3", (6, 3)), ("vita_r50_enc3dec6", (3, 6))])
def test_full_size_round_trip(
    sizes: str, layers: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys and shapes of a real checkpoint; each tensor repeats one random number, which keeps the file small."""
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.rand((), generator=generator).expand(shape) for key, shape in key_shapes(sizes).items()}
    source = tmp_path / "vita.pth"
    torch.save({"model": tensors, "iteration": 0}, source)
    write_full_size_cache(tmp_path / "cache", tensors)
    folder = tmp_path / "run"
    assert run(monkeypatch, "import-release", source, "--output", folder, "--cache", tmp_path / "cache") == 0
    config = load_checkpoint(folder / CHECKPOINT).config
    assert (config.enc_layers, config.dec_layers) == layers
    assert (config.num_classes, config.num_queries, config.num_frame_queries, config.ffn_dim) == (40, 100, 100, 2048)
    assert run(monkeypatch, "export-release", folder, tmp_path / "out.pth", "--detector", source) == 0
    assert_same(tensors_in(tmp_path / "out.pth"), tensors)


def write_full_size_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    """One frame of zeros, extracted (so the heads say) with the detector in `tensors`, from another file."""
    arrays = {}
    for name, symbols in HEAD_SHAPES.items():
        part = "pixel_decoder" if name.startswith("mask_features") else "predictor"
        array = tensors[f"sem_seg_head.{part}.{name}"].numpy()
        arrays[name] = np.ascontiguousarray(array.reshape(array.shape[: len(symbols)]))
    content = json.loads(labels_of({1: 1})) | {"categories": [{"id": i, "name": f"{i}"} for i in range(1, 41)]}
    writer = CacheWriter.open(
        path,
        fingerprint=FINGERPRINT,
        heads=DetectorHeads(arrays=arrays, category_names=()),
        codec=Float16(),
        labels_json=json.dumps(content).encode(),
    )
    attributes = VideoAttributes(num_frames=1, image_hw=(32, 32), padded_hw=(32, 32), original_hw=(48, 80))
    with writer.video("1", attributes) as sink:
        sink.append(np.zeros((1, 3, 100, 256), np.float32), np.zeros((1, 256, 8, 8), np.float32))


def scores_without_cache(release: Release, frames: list[Path]) -> list[tuple[int, float]]:
    """(label, score) of the best tracks: detector and dense masks in one go, as the original evaluates a video."""
    detector, head = load_detector(release.file, num_layers=1), golden_head()
    images = torch.stack([torch.from_numpy(np.array(Image.open(frame))).permute(2, 0, 1) for frame in frames])
    features, arrays = detector.features(images), detector.prediction_heads().arrays
    norm = [torch.from_numpy(arrays[f"decoder_norm.{name}"]) for name in ("weight", "bias")]
    with torch.no_grad():
        outputs = head.predict(F.layer_norm(features.frame_queries_BLQC[:, 0], (64,), *norm))
        maps = head.vita_mask_features(features.mask_features_BCHW)
        logits = torch.einsum("vc,tchw->tvhw", outputs.mask_embed_VC, maps)
        logits = F.interpolate(logits, scale_factor=4, mode="bilinear")[..., : ORIGINAL_HW[0], : ORIGINAL_HW[1]]
        probability = logits.sigmoid()
        certain = probability > 0.5
        quality = (probability * certain).sum(dim=(0, 2, 3)) / (certain.sum(dim=(0, 2, 3)) + 1e-6)
        grid = outputs.class_logits_VK.softmax(dim=-1)[:, :-1]
        best = grid.flatten().topk(TOP_K).indices.tolist()
    return sorted((index % 5, float(grid.flatten()[index] * quality[index // 5])) for index in best)


def test_imported_head_scores_from_the_cache_as_from_pixels(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the video of a single frame. The float16 codec is between the two: measured 1e-4."""
    run(monkeypatch, *import_arguments(release, "scored"))
    evaluation = evaluate(release.settings("name=scored"))
    results = json.loads((evaluation.folder / "results.json").read_text())
    for video_id, length in LENGTHS.items():
        tracks = [result for result in results if result["video_id"] == video_id]
        frames = [release.root / "frames" / str(video_id) / f"{index:05}.png" for index in range(length)]
        expected = scores_without_cache(release, frames)
        actual = sorted((track["category_id"] - 1, track["score"]) for track in tracks)
        assert [label for label, _ in actual] == [label for label, _ in expected]
        assert [score for _, score in actual] == pytest.approx([score for _, score in expected], abs=1e-3)
        assert all(len(track["segmentations"]) == length for track in tracks)


def test_an_imported_head_has_a_config_to_compare_and_to_predict_with(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *import_arguments(release, "imported"))
    assert "warning: its config evaluates on train videos" in capsys.readouterr().out
    folder = release.root / "runs" / "imported"
    config, wanted = str(folder / CONFIG), release.settings("name=imported")
    settings = load_settings(config)
    assert (settings.head, settings.detector) == (wanted.head, wanted.detector)
    assert settings.data == replace(wanted.data, holdout=0.1)
    assert (settings.cache.path, settings.cache.codec) == (wanted.cache.path, wanted.cache.codec)
    evaluated = evaluate(load_settings(config, ["evaluate.split=train"])).metrics["head"]
    (entry,) = read_entries(folder, [], LabelFiles())
    assert evaluated is not None and entry.evaluation.metrics().AP == evaluated.AP
    assert differences(read_groups([str(folder)], [])) == []  # it has no steps, and has not stopped before its last
    frames = release.root / "frames" / "1"
    features = extract_footage(config, [str(frames), f"cache.path={tmp_path / 'cache'}"], head=folder)
    (written,) = predict(settings, folder, features, tmp_path / "out", 0.0)
    assert written.tracks > 0


def test_training_goes_on_from_an_imported_head(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """On videos of three frames and of one: the one-frame clip repeats its frame."""
    run(monkeypatch, *import_arguments(release, "tuned"))
    before = load_checkpoint(release.root / "runs/tuned" / CHECKPOINT)
    train(release.settings("name=tuned", "train.learning_rate=1e-4"))
    after = load_checkpoint(release.root / "runs/tuned" / CHECKPOINT)
    changes = [float((after.head[name] - before.head[name]).abs().max()) for name in before.head]
    assert after.step == 2
    assert 0 < max(changes) < 1e-3


def test_training_on_with_another_head_is_refused(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *import_arguments(release, "other"))
    with pytest.raises(ValueError, match=r"head\.window is 6"):
        train(release.settings("name=other", "head.window=3"))


def test_files_that_do_not_belong_are_refused(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(tensors: dict[str, Tensor]) -> str:
        torch.save({"model": tensors}, tmp_path / "file.pth")
        output = tmp_path / "run"
        arguments = ("import-release", tmp_path / "file.pth", "--output", output, "--cache", release.features)
        assert run(monkeypatch, *arguments) == 2
        assert not output.exists()
        return capsys.readouterr().err

    other = release.tensors["sem_seg_head.predictor.decoder_norm.bias"] + 1e-3
    assert "no VITA head" in refusal(official_state("r50"))
    assert "not the one that filled" in refusal(release.tensors | {"sem_seg_head.predictor.decoder_norm.bias": other})
    assert "categories (expected 5" in refusal(
        release.tensors
        | {
            f"{RELEASE_PREFIX}class_embed.weight": torch.zeros(9, 64),
            f"{RELEASE_PREFIX}class_embed.bias": torch.zeros(9),
        }
    )
    without = {name: tensor for name, tensor in release.tensors.items() if "enc_ffn.1." not in name}
    assert "enc_ffn.1.linear1.bias" in refusal(without)
    without = {name: tensor for name, tensor in release.tensors.items() if "input_proj_dec" not in name}
    assert "ENFORCE_INPUT_PROJ" in refusal(without)
