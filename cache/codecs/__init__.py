"""How mask features are stored: one codec per file, chosen by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from cache.codecs.blocks import Planes
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.logit import Logit
from cache.codecs.spectral import Spectral
from cache.errors import CacheError
from cache.layout import Size


class Codec(Protocol):
    """A linear code of the mask features, fixed for a whole cache.

    `parameters` (JSON values) and `arrays` are all that `load` needs to rebuild it. Being linear, it never
    has to be undone: `fold` moves it into the mask embeddings instead, since they only ever meet in dot products.
    """

    name: ClassVar[str]
    dtype: ClassVar[np.dtype[Any]]
    compressed: ClassVar[bool]
    """Whether frames are stored compressed without loss: it pays where the numbers are far from uniform."""
    block: ClassVar[int]
    """Pixels of the map that one stored position stands for, in each direction: (h, w) = (H, W) / block, rounded up."""

    @property
    def planes(self) -> Planes | None:
        """How stored numbers become channels at pixels; None: they are that already."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Settings, stored in the root's attributes."""
        ...

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Fitted arrays, stored in the group `codec`."""
        ...

    def stored_channels(self, num_channels: int) -> int:
        """R, the number of stored channels, of C detector channels."""
        ...

    def encode(self, mask_features_TCHW: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """(T, C, H, W) -> (T, R, h, w) of `dtype`."""
        ...

    def decode(self, stored_TRhw: NDArray[Any], map_hw: Size | None = None, /) -> NDArray[np.float32]:
        """(T, R, h, w) of `dtype` -> (T, C, H, W); `map_hw` cuts what blocks have beyond the map."""
        ...

    def fold(
        self, mask_embeddings: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]] | None]:
        """Mask embeddings (..., C) -> ((..., K), constant (...) or None): the same logits on maps of K channels.

        The maps are what is stored (K = R) or, with `planes`, what they make of it.
        """
        ...


CODECS: dict[str, type[Float16 | Int8 | Logit | Spectral]] = {
    "float16": Float16,
    "int8": Int8,
    "logit": Logit,
    "spectral": Spectral,
}


def select_codec(name: str, parameters: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Codec:
    """The codec of this name, with its settings and fitted arrays. Raises CacheError for unknown names."""
    return codec_class(name).load(parameters, arrays)


def codec_class(name: str) -> type[Float16 | Int8 | Logit | Spectral]:
    """What decodes caches of this name. Raises CacheError for unknown names."""
    if name not in CODECS:
        raise CacheError("unknown codec", got=repr(name), expected=" or ".join(CODECS))
    return CODECS[name]


def codec_identity(codec: Codec) -> str:
    """What the fingerprint says of a codec: its name and, where it was fitted, `:` and 16 digits of its content.

    Two fits store different numbers for the same frame, so their caches are not interchangeable.
    """
    if not codec.parameters and not codec.arrays:
        return codec.name
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in sorted(codec.arrays.items())}
    shapes = {name: array.shape for name, array in arrays.items()}
    header = json.dumps({"parameters": dict(codec.parameters), "shapes": shapes}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(header.encode() + b"".join(array.tobytes() for array in arrays.values()))
    return f"{codec.name}:{digest.hexdigest()[:16]}"
