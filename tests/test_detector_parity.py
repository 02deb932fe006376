"""Our detector against numbers recorded from the original Mask2Former (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cache.errors import ConfigError, FrameError
from cache.heads import DetectorHeads
from extract.detector.frozen import FrameFeatures, TransformersDetector, normalise_and_pad
from tests.detector_samples import golden_arrays, load_sample

TOLERANCE = 1e-4
NUM_DECODER_LAYERS = 9


class Recorded:
    """One golden model: our detector run on its inputs, and what the original gave."""

    def __init__(self, name: str, folder: Path) -> None:
        self.detector: TransformersDetector = load_sample(name, folder, NUM_DECODER_LAYERS)
        self.heads: DetectorHeads = self.detector.prediction_heads()
        self.expected = golden_arrays(name, "outputs.npz")
        images = golden_arrays(name, "inputs.npz")
        self.images = [torch.from_numpy(images[f"image{i}"]).permute(2, 0, 1)[None] for i in range(2)]
        self.multi_scale: list[Tensor] = []
        hook = self.detector.model.model.pixel_level_module.decoder.register_forward_hook(
            lambda _module, _inputs, output: self.multi_scale.extend(output.multi_scale_features)
        )
        self.features: FrameFeatures = self.detector.features_of_canvas(self.canvas())
        hook.remove()

    def canvas(self) -> Tensor:
        """Both images on one canvas; the original batches images of two sizes, extraction never does."""
        height, width = 96, 160
        canvases = [normalise_and_pad(image.float()) for image in self.images]
        return torch.cat([functional.pad(c, (0, width - c.shape[3], 0, height - c.shape[2])) for c in canvases])

    def normed_queries(self) -> NDArray[np.float32]:
        """(L, B, Q, C): the stored queries through the exported `decoder_norm`, in plain numpy."""
        queries = self.features.frame_queries_BLQC.numpy().swapaxes(0, 1)
        centred = queries - queries.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return normed * self.heads.arrays["decoder_norm.weight"] + self.heads.arrays["decoder_norm.bias"]

    def class_logits(self) -> NDArray[np.float32]:
        return self.normed_queries() @ self.heads.arrays["class_embed.weight"].T + self.heads.arrays["class_embed.bias"]

    def mask_embeddings(self) -> NDArray[np.float32]:
        hidden = self.normed_queries()
        for layer in range(3):
            name = f"mask_embed.layers.{layer}"
            hidden = hidden @ self.heads.arrays[f"{name}.weight"].T + self.heads.arrays[f"{name}.bias"]
            hidden = np.maximum(hidden, 0) if layer < 2 else hidden
        return hidden

    def mask_features(self) -> NDArray[np.float32]:
        """(B, E, H, W): the detector's own 1x1 convolution on the stored map."""
        stored = self.features.mask_features_BCHW.numpy()
        bias = self.heads.arrays["mask_features.bias"]
        return np.einsum("ec,bchw->behw", self.heads.arrays["mask_features.weight"], stored) + bias[:, None, None]

    def masks(self) -> NDArray[np.float32]:
        return np.einsum("bqe,behw->bqhw", self.mask_embeddings()[-1], self.mask_features())


@pytest.fixture(scope="module", params=["r50", "swin"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(request.param, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("level", range(3))
def test_multi_scale_features(recorded: Recorded, level: int) -> None:
    difference = recorded.multi_scale[level].numpy() - recorded.expected[f"ms{level}"]
    assert np.abs(difference).max() < TOLERANCE


OUTPUTS: dict[str, tuple[Callable[[Recorded], NDArray[np.float32]], Callable[[Recorded], NDArray[np.generic]]]] = {
    "fpn map": (lambda r: r.features.mask_features_BCHW.numpy(), lambda r: r.expected["clip_mask_features"]),
    "normed queries": (Recorded.normed_queries, lambda r: r.expected["queries_normed"][1:]),
    "class logits": (Recorded.class_logits, lambda r: r.expected["pred_logits"][1:]),
    "mask embeddings": (Recorded.mask_embeddings, lambda r: r.expected["mask_embed"][1:]),
    "mask features": (Recorded.mask_features, lambda r: r.expected["mask_features"]),
    "masks": (Recorded.masks, lambda r: r.expected["pred_masks"]),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_features_and_heads_give_the_originals_outputs(recorded: Recorded, output: str) -> None:
    ours, originals = (read(recorded) for read in OUTPUTS[output])
    assert ours.shape == originals.shape
    assert np.abs(ours - originals).max() < TOLERANCE


def test_public_path_from_raw_pixels(recorded: Recorded) -> None:
    """uint8 frames in: normalising and padding included, one image alone gives what the batch of two gave."""
    features = recorded.detector.features(recorded.images[0])
    difference = features.mask_features_BCHW[0].numpy() - recorded.expected["clip_mask_features"][0]
    assert np.abs(difference).max() < TOLERANCE
    queries = recorded.features.frame_queries_BLQC[:1]
    assert (features.frame_queries_BLQC - queries).abs().max() < TOLERANCE


def test_fewer_layers_are_the_last_ones(recorded: Recorded) -> None:
    detector = TransformersDetector(recorded.detector.model, num_layers=3)
    queries = detector.features_of_canvas(recorded.canvas()).frame_queries_BLQC
    assert torch.equal(queries, recorded.features.frame_queries_BLQC[:, -3:])


def test_detector_is_frozen(recorded: Recorded) -> None:
    features = recorded.detector.features(recorded.images[1])
    assert not features.frame_queries_BLQC.requires_grad
    assert not features.mask_features_BCHW.requires_grad
    assert not any(module.training for module in recorded.detector.model.modules())
    assert not any(parameter.requires_grad for parameter in recorded.detector.model.parameters())


def test_padding_is_zero_after_normalising() -> None:
    images = torch.arange(3 * 33 * 31, dtype=torch.float32).view(1, 3, 33, 31) % 256
    canvas = normalise_and_pad(images)
    assert canvas.shape == (1, 3, 64, 32)
    assert canvas[0, 1, 2, 3] == pytest.approx((float(images[0, 1, 2, 3]) - 116.28) / 57.12)
    assert not canvas[:, :, 33:].any()
    assert not canvas[:, :, :, 31:].any()


@pytest.mark.parametrize("settings", [{"num_layers": 0}, {"num_layers": 10}, {"precision": "int8"}])
def test_impossible_settings_are_refused(recorded: Recorded, settings: dict[str, int | str]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TransformersDetector(recorded.detector.model, **settings)  # type: ignore[arg-type]


def test_precision_says_what_was_used(recorded: Recorded) -> None:
    assert TransformersDetector(recorded.detector.model, precision="bfloat16", device="cpu").precision == "float32"


def test_frames_of_another_layout_are_refused(recorded: Recorded) -> None:
    with pytest.raises(FrameError, match=r"\(B, 3, H, W\)"):
        recorded.detector.features(torch.zeros(1, 96, 160, 3))
