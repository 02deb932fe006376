"""The detector of stage one with gradients: given the data set's classes, trained, written where `extract` reads it.

Shapes: B images, D prediction layers (the learnable queries, then every decoder layer), Q frame queries,
C query channels, K classes, E mask embedding size, F map channels, H×W the stride-4 map.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from extract.detector.architectures import describe_backbone
from extract.detector.frozen import PRECISIONS, detector_forward, normalise_and_pad, require_frame_batch
from extract.detector.key_table import from_official, key_table, to_official
from extract.detector.loading import quiet_transformers


@dataclass(frozen=True, kw_only=True)
class LayerPredictions:
    """What the detector says of B frames after each of its D prediction layers; float32, with gradients."""

    frame_queries_DBQC: Tensor  # after decoder_norm
    class_logits_DBQK: Tensor  # K + 1 entries, the last is "no object"
    mask_embed_DBQE: Tensor
    mask_features_BFHW: Tensor  # the FPN map, VITA's tap

    def split(self, num_frames: int) -> list[LayerPredictions]:
        """Groups of `num_frames` frames."""
        parts = zip(
            torch.split(self.frame_queries_DBQC, num_frames, dim=1),
            torch.split(self.class_logits_DBQK, num_frames, dim=1),
            torch.split(self.mask_embed_DBQE, num_frames, dim=1),
            torch.split(self.mask_features_BFHW, num_frames),
            strict=True,
        )
        return [
            LayerPredictions(
                frame_queries_DBQC=queries, class_logits_DBQK=logits, mask_embed_DBQE=embed, mask_features_BFHW=maps
            )
            for queries, logits, embed, maps in parts
        ]


class TrainableDetector(nn.Module):
    """Stock Mask2Former to be trained. Batch norms keep their statistics and scales, as the original's frozen ones."""

    def __init__(self, model: Mask2FormerForUniversalSegmentation, *, precision: str = "float32") -> None:
        super().__init__()
        self.model, self.precision = model, precision
        self.table = key_table(model.config)
        self.train()
        for norm in self._batch_norms():
            norm.requires_grad_(False)

    def train(self, mode: bool = True) -> TrainableDetector:
        """Switch stochastic depth on or off; batch norms stay as they are."""
        super().train(mode)
        for norm in self._batch_norms():
            norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    @property
    def backbone(self) -> nn.Module:
        """What takes the smaller share of the learning rate."""
        encoder: nn.Module = self.model.model.pixel_level_module.encoder
        return encoder

    @property
    def rest(self) -> nn.Module:
        """Everything but the backbone."""
        model = self.model.model
        return nn.ModuleList([model.pixel_level_module.decoder, model.transformer_module, self.model.class_predictor])

    @property
    def mask_convolution(self) -> nn.Conv2d:
        """The 1x1 convolution from the FPN map to the detector's own mask features."""
        convolution = self.model.model.pixel_level_module.decoder.mask_projection
        assert isinstance(convolution, nn.Conv2d)
        return convolution

    @property
    def architecture(self) -> str:
        """As the cache's fingerprint names it."""
        return describe_backbone(self.model.config)

    def forward(self, images_BCHW: Tensor) -> LayerPredictions:
        """Predictions for RGB images of one size, (B, 3, H, W), values 0..255; FrameError for another shape."""
        images_BCHW = require_frame_batch(images_BCHW).float()
        features = detector_forward(
            self.model.model,
            normalise_and_pad(images_BCHW),
            num_layers=self.model.config.decoder_layers,  # transformers counts the learnable queries
            autocast_dtype=PRECISIONS[self.precision],
        )
        decoder = self.model.model.transformer_module.decoder
        with torch.autocast(images_BCHW.device.type, enabled=False):
            normed_DBQC = decoder.layernorm(features.frame_queries_BLQC.transpose(0, 1))
            return LayerPredictions(
                frame_queries_DBQC=normed_DBQC,
                class_logits_DBQK=self.model.class_predictor(normed_DBQC),
                mask_embed_DBQE=decoder.mask_predictor.mask_embedder(normed_DBQC),
                mask_features_BFHW=features.mask_features_BCHW,
            )

    def official_state(self) -> dict[str, Tensor]:
        """The weights under their official names, bit for bit."""
        return to_official(self.table, self.model.state_dict())

    def load_official_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `official_state` returned."""
        self.model.load_state_dict(from_official(self.table, state), strict=False)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that `extract` reads as `detector.weights`; it replaces an older one."""
        temporary, older = (folder.with_name(f"{folder.name}.{word}") for word in ("tmp", "old"))
        for left in (temporary, older):
            shutil.rmtree(left, ignore_errors=True)
        with quiet_transformers():
            self.model.save_pretrained(temporary, safe_serialization=True)
        if folder.exists():
            folder.rename(older)  # It takes long to remove: a kill meanwhile must not leave none.
        temporary.rename(folder)
        shutil.rmtree(older, ignore_errors=True)


def with_classes(
    model: Mask2FormerForUniversalSegmentation,
    category_names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    seed: int,
) -> Mask2FormerForUniversalSegmentation:
    """Give a model, in place, a class layer for `category_names`.

    pairs: (class of the data set, class of the detector) that mean the same; such a row is the detector's own, so
    is "no object". The others are drawn at random.
    """
    old, count = model.class_predictor, len(category_names)
    generator = torch.Generator().manual_seed(seed)
    new = nn.Linear(old.in_features, count + 1)
    with torch.no_grad():
        for tensor in (new.weight, new.bias):
            tensor.uniform_(-(old.in_features**-0.5), old.in_features**-0.5, generator=generator)
        rows, kept = [*[row for row, _ in pairs], count], [*[row for _, row in pairs], len(old.weight) - 1]
        new.weight[rows], new.bias[rows] = old.weight[kept], old.bias[kept]
    class_weights = torch.tensor([1.0] * count + [model.config.no_object_weight])
    model.criterion.register_buffer("empty_weight", class_weights)  # unused here, but a part of the files
    model.class_predictor = new
    model.config.id2label = dict(enumerate(category_names))
    model.config.label2id = {name: index for index, name in enumerate(category_names)}
    return model
