"""The detector's frozen prediction heads, as the cache carries them.

They are tiny, exported once per cache, and turn pre-norm frame queries back into everything the detector
predicts: normed queries, class logits, mask embeddings and, with the stored FPN map, masks (Mask2Former's
predictor, arXiv 2112.01527, section 3).

Shape legend: C query channels, K categories (the class layer has K + 1 rows, the last is "no object"),
E mask-embedding channels, F channels of the FPN map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import VitaCacheError, WeightsError

HEAD_SHAPES: Mapping[str, tuple[str, ...]] = {
    "decoder_norm.weight": ("C",),
    "decoder_norm.bias": ("C",),
    "class_embed.weight": ("K+1", "C"),
    "class_embed.bias": ("K+1",),
    "mask_embed.layers.0.weight": ("C", "C"),
    "mask_embed.layers.0.bias": ("C",),
    "mask_embed.layers.1.weight": ("C", "C"),
    "mask_embed.layers.1.bias": ("C",),
    "mask_embed.layers.2.weight": ("E", "C"),
    "mask_embed.layers.2.bias": ("E",),
    "mask_features.weight": ("E", "F"),
    "mask_features.bias": ("E",),
}
"""Required arrays, named as in official checkpoints relative to the predictor, with symbolic shapes."""


def axis_sizes(
    arrays: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, tuple[str, ...]],
    refusal: type[VitaCacheError],
    where: str,
) -> dict[str, int]:
    """The size of every symbolic axis. Raises `refusal` for arrays that contradict each other or are not float32."""
    sizes: dict[str, int] = {}
    for name, symbols in shapes.items():
        array = arrays[name]
        expected = tuple(sizes.setdefault(s, n) for s, n in zip(symbols, array.shape, strict=False))
        if array.dtype != np.float32 or array.shape != expected or array.ndim != len(symbols):
            raise refusal(
                f"array {name!r} does not fit",
                where=where,
                expected=f"float32 ({', '.join(symbols)}) with {sizes}",
                got=f"{array.dtype} {array.shape}",
            )
    return sizes


@dataclass(frozen=True, kw_only=True)
class DetectorHeads:
    """Frozen prediction heads of the detector.

    arrays: float32, names and shapes of `HEAD_SHAPES`; `mask_features` is the detector's own 1x1 convolution
        on the FPN map, stored as a matrix.
    category_names: K names in the order of the class logits, or empty where the weights do not name them.

    Raises WeightsError when an array is missing, unexpected, not float32, or contradicts the others' shapes.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    category_names: tuple[str, ...]

    def __post_init__(self) -> None:
        missing = [name for name in HEAD_SHAPES if name not in self.arrays]
        unexpected = [name for name in self.arrays if name not in HEAD_SHAPES]
        if missing or unexpected:
            raise WeightsError(
                f"missing {missing}, unexpected {unexpected}",
                where="detector heads",
                expected=f"the {len(HEAD_SHAPES)} arrays of a Mask2Former predictor",
            )
        sizes = axis_sizes(self.arrays, HEAD_SHAPES, WeightsError, "detector heads")
        if self.category_names and len(self.category_names) != sizes["K+1"] - 1:
            raise WeightsError(
                "the number of category names differs from the class layer",
                where="detector heads",
                expected=sizes["K+1"] - 1,
                got=len(self.category_names),
            )

    @property
    def hidden_dim(self) -> int:
        """C, channels of a frame query."""
        return int(self.arrays["decoder_norm.weight"].shape[0])

    @property
    def num_classes(self) -> int:
        """K, categories of the detector without "no object"."""
        return int(self.arrays["class_embed.bias"].shape[0]) - 1

    @property
    def feature_dim(self) -> int:
        """F, channels of the FPN map that the masks are made from."""
        return int(self.arrays["mask_features.weight"].shape[1])
