"""The detectron2 engine with the real detectron2 and a real Mask2Former or VITA checkout; skipped without them.

`make detectron2`, then `PYTHONPATH=/path/to/Mask2Former make test` (or VITA) runs it. What can go wrong before
either of them is imported is tested everywhere.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import ConfigError, WeightsError
from cache.reader import CachedVideo, FeatureCache
from configs.load import load_settings
from extract.detector.detectron2_engine import Detectron2Detector, load_detectron2_detector
from extract.detector.engines import open_detector
from extract.detector.frozen import FrameFeatures, TransformersDetector, load_detector
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.detector_samples import GOLDEN, golden_arrays, write_checkpoint

TOLERANCE = 1e-4
NUM_DECODER_LAYERS = 9
has_detectron2 = importlib.util.find_spec("detectron2") is not None
has_code_base = importlib.util.find_spec("mask2former") is not None
has_vita = importlib.util.find_spec("vita") is not None
live = pytest.mark.skipif(not (has_detectron2 and has_code_base), reason="needs detectron2 and mask2former")

VITA_SETTINGS = """_BASE_: {base}
MODEL:
  META_ARCHITECTURE: Vita
  MASK_FORMER: {{TRANSFORMER_DECODER_NAME: VitaMultiScaleMaskedTransformerDecoder}}
  VITA: {{HIDDEN_DIM: 64, DIM_FEEDFORWARD: 128, NUM_OBJECT_QUERIES: 15, ENC_LAYERS: 3, DEC_LAYERS: 6}}
"""


def config_file(name: str, folder: Path) -> Path:
    """The golden config; with VITA's code base as its meta-architecture, since its decoder fits no other."""
    golden = GOLDEN / f"mask2former_tiny_{name}" / "config.yaml"
    if not has_vita:
        return golden
    (folder / "vita.yaml").write_text(VITA_SETTINGS.format(base=golden))
    return folder / "vita.yaml"


class Engines:
    """One checkpoint in both engines."""

    def __init__(self, name: str, folder: Path) -> None:
        weights = write_checkpoint(name, folder)
        self.name = name
        self.transformers: TransformersDetector = load_detector(weights, num_layers=NUM_DECODER_LAYERS)
        self.detectron2: Detectron2Detector = load_detectron2_detector(
            weights, config_file(name, folder), num_layers=NUM_DECODER_LAYERS
        )

    def image(self, index: int) -> torch.Tensor:
        return torch.from_numpy(golden_arrays(self.name, "inputs.npz")[f"image{index}"]).permute(2, 0, 1)[None]


@pytest.fixture(scope="module", params=["r50", "swin"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(request.param, tmp_path_factory.mktemp("weights"))


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max())


@live
@pytest.mark.parametrize("index", [0, 1])
def test_both_engines_give_the_same_features(engines: Engines, index: int) -> None:
    ours: FrameFeatures = engines.detectron2.features(engines.image(index))
    theirs = engines.transformers.features(engines.image(index))
    assert largest_difference(ours.frame_queries_BLQC, theirs.frame_queries_BLQC) < TOLERANCE
    assert largest_difference(ours.mask_features_BCHW, theirs.mask_features_BCHW) < TOLERANCE


@live
def test_features_are_the_recorded_ones(engines: Engines) -> None:
    """The recorded batch has the size of its first image, so that image alone gives the same."""
    expected = golden_arrays(engines.name, "outputs.npz")
    features = engines.detectron2.features(engines.image(0))
    recorded = torch.from_numpy(expected["clip_mask_features"][:1])
    assert largest_difference(features.mask_features_BCHW, recorded) < TOLERANCE
    arrays = engines.detectron2.prediction_heads().arrays
    norm = [torch.from_numpy(arrays[f"decoder_norm.{name}"]) for name in ("weight", "bias")]
    normed = torch.nn.functional.layer_norm(features.frame_queries_BLQC[0], (64,), *norm)
    assert largest_difference(normed, torch.from_numpy(expected["queries_normed"][1:, 0])) < TOLERANCE


@live
def test_heads_and_descriptions_agree(engines: Engines) -> None:
    ours, theirs = engines.detectron2.prediction_heads(), engines.transformers.prediction_heads()
    assert all((ours.arrays[name] == theirs.arrays[name]).all() for name in theirs.arrays)
    assert ours.category_names == theirs.category_names
    assert engines.detectron2.pixel_mean == engines.transformers.pixel_mean
    assert engines.detectron2.pixel_std == engines.transformers.pixel_std
    assert engines.detectron2.architecture.startswith(engines.transformers.architecture)
    assert engines.detectron2.report is not None and engines.transformers.report is not None
    assert engines.detectron2.report.matched == engines.transformers.report.matched


@live
def test_extraction_with_either_engine(tiny_data: Path, engines: Engines, tmp_path: Path) -> None:
    """Through stage one: the same stored features but for a float16 rounding, and fingerprints that tell them apart."""
    weights = write_checkpoint(engines.name, tmp_path)
    chosen = {
        "one": [],
        "two": ["detector.engine=detectron2", f"detector.config_file={config_file(engines.name, tmp_path)}"],
    }
    caches = []
    for name, overrides in chosen.items():
        features = tmp_path / name
        extract(tiny_settings(tiny_data, features, tmp_path, f"detector.weights={weights}", *overrides), only=["valid"])
        caches.append(FeatureCache.open(features / "valid"))
    for video in caches[0].video_names():
        stored = [feature_cache.video(video) for feature_cache in caches]
        for read in (CachedVideo.frame_queries, CachedVideo.mask_features):
            ours, theirs = (read(video).astype(np.float32) for video in stored)
            assert np.abs(ours - theirs).max() <= 2**-10 * np.abs(ours).max() + TOLERANCE
    (difference,) = caches[0].fingerprint.differences(caches[1].fingerprint)
    assert "detector architecture" in difference


@live
def test_blue_first_configs_get_their_channels(engines: Engines, tmp_path: Path) -> None:
    """INPUT.FORMAT BGR with mean and deviation swapped: a blue-first image is normalised as before, then flipped."""
    base = config_file(engines.name, tmp_path)
    flipped = tmp_path / "bgr.yaml"
    flipped.write_text(
        f"_BASE_: {base}\nINPUT: {{FORMAT: BGR}}\n"
        "MODEL: {PIXEL_MEAN: [103.53, 116.28, 123.675], PIXEL_STD: [57.375, 57.12, 58.395]}\n"
    )
    detector = load_detectron2_detector(write_checkpoint(engines.name, tmp_path), flipped, num_layers=1)
    canvases: list[torch.Tensor] = []
    detector.model.backbone.register_forward_pre_hook(lambda _module, inputs: canvases.append(inputs[0]))
    detector.features(engines.image(0))
    red_first = engines.image(0)[0, 0, 5, 7]
    assert float(canvases[0][0, 2, 5, 7]) == pytest.approx((float(red_first) - 123.675) / 58.395, abs=1e-5)
    assert detector.pixel_mean == engines.transformers.pixel_mean


@live
def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    weights = write_checkpoint("swin", tmp_path)
    with pytest.raises(WeightsError, match="do not fit the model"):
        load_detectron2_detector(weights, config_file("r50", tmp_path))
    chosen = load_settings(
        "demo",
        [
            f"detector.weights={write_checkpoint('r50', tmp_path)}",
            f"detector.config_file={config_file('r50', tmp_path)}",
            *("detector.engine=detectron2", "detector.architecture=r101"),
        ],
    ).detector
    with pytest.raises(WeightsError, match="expected r101, got resnet"):
        open_detector(chosen, precision="float32", device="cpu")
    with pytest.raises(WeightsError, match="official"):
        load_detectron2_detector(tmp_path, config_file("r50", tmp_path))


@live
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("MODEL: {MASK_FORMER: {SIZE_DIVISIBILITY: 64}}", "SIZE_DIVISIBILITY"),
        ("MODEL: {META_ARCHITECTURE: Elsewhere}", "Elsewhere"),
        ("MODEL: {NO_SUCH_SETTING: 1}", "NO_SUCH_SETTING"),
        ("MODEL: [", "cannot read"),
    ],
)
def test_unusable_configs_are_refused(line: str, message: str, tmp_path: Path) -> None:
    base = config_file("r50", tmp_path)
    changed = tmp_path / "changed.yaml"
    changed.write_text(f"_BASE_: {base}\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        load_detectron2_detector(write_checkpoint("r50", tmp_path), changed)


@pytest.mark.skipif(has_detectron2, reason="detectron2 is here")
def test_missing_detectron2_is_named(tmp_path: Path) -> None:
    config = GOLDEN / "mask2former_tiny_r50" / "config.yaml"
    with pytest.raises(ConfigError, match="make detectron2"):
        load_detectron2_detector(write_checkpoint("r50", tmp_path), config)


@pytest.mark.skipif(not has_detectron2 or has_code_base, reason="needs detectron2 without a code base")
def test_missing_code_base_is_named(tmp_path: Path) -> None:
    config = GOLDEN / "mask2former_tiny_r50" / "config.yaml"
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        load_detectron2_detector(write_checkpoint("r50", tmp_path), config)


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_detectron2_detector(write_checkpoint("r50", tmp_path), tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("overrides", [["detector.engine=detectron2"], ["detector.config_file=a.yaml"]])
def test_engine_and_config_file_go_together(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"detector\.config_file"):
        load_settings("demo", overrides)
