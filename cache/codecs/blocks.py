"""Maps in blocks of 8 × 8 pixels and their cosine transform, in which neighbouring pixels no longer say the same.

The transform (DCT-II, orthonormal, as in JPEG) keeps squared errors: a step in a coefficient is a step in the pixels.

Shapes: K channels, F = 64 frequencies (vertical · 8 + horizontal), H×W the map, h×w its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.codecs.digits import DIGIT
from cache.layout import Size

BLOCK = 8
FREQUENCIES = BLOCK * BLOCK


def block_grid(map_hw: Size, block: int) -> Size:
    """(h, w) of a map's blocks; those at the bottom and on the right may reach beyond it."""
    return -(-map_hw[0] // block), -(-map_hw[1] // block)


@cache
def cosines() -> NDArray[np.float64]:
    """The transform of a block's pixels, row by row: (F, 64), orthonormal."""
    pixel, frequency = np.arange(BLOCK), np.arange(BLOCK)[:, None]
    basis = np.cos(np.pi * (2 * pixel + 1) * frequency / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    basis[0] /= np.sqrt(2)
    return np.kron(basis, basis)


def to_blocks(
    maps_KHW: NDArray[np.floating[Any]], frequencies: NDArray[np.int64] | slice = slice(None)
) -> NDArray[np.floating[Any]]:
    """(K, H, W) -> coefficients (K, F, h·w), or of some frequencies alone.

    Edge pixels are repeated where blocks reach beyond the map.
    """
    K, H, W = maps_KHW.shape
    h, w = block_grid((H, W), BLOCK)
    padded, whole_hw = maps_KHW, (h * BLOCK, w * BLOCK)
    if whole_hw != (H, W):  # The copy is a tenth of encoding a small map.
        padded = np.pad(maps_KHW, ((0, 0), (0, whole_hw[0] - H), (0, whole_hw[1] - W)), mode="edge")
    # Channel by channel, which a CPU's cache holds: all at once, in one large product, took three times as long.
    pixels_KFS = padded.reshape(K, h, BLOCK, w, BLOCK).transpose(0, 2, 4, 1, 3).reshape(K, FREQUENCIES, h * w)
    return np.asarray(cosines()[frequencies].astype(maps_KHW.dtype) @ pixels_KFS)


def from_blocks(coefficients_KFS: NDArray[np.floating[Any]], map_hw: Size) -> NDArray[np.floating[Any]]:
    """Coefficients (K, F, h·w) of one frame -> (K, H, W)."""
    (h, w), K = block_grid(map_hw, BLOCK), len(coefficients_KFS)
    pixels_KpS = cosines().T.astype(coefficients_KFS.dtype) @ coefficients_KFS
    whole = pixels_KpS.reshape(K, BLOCK, BLOCK, h, w).transpose(0, 3, 1, 4, 2).reshape(K, h * BLOCK, w * BLOCK)
    return np.asarray(whole[:, : map_hw[0], : map_hw[1]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Planes:
    """Which coefficients are stored, and where: a plane is one channel at one frequency, a number for every block.

    Shapes: T frames, N planes, P of them wide, R = N + P stored numbers of a block.
    """

    number_N: NDArray[np.int64]
    """Channel · 64 + frequency."""
    num_wide: int
    """P: the first planes have a second digit, stored behind all the others."""
    num_channels: int
    """K."""

    def expand(self, stored_TRhw: NDArray[Any], map_hw: Size | None = None) -> NDArray[np.float32]:
        """Stored digits (T, R, h, w) -> the channels at pixels (T, K, H, W); None: whole blocks."""
        num_frames, _, h, w = stored_TRhw.shape
        map_hw = map_hw or (h * BLOCK, w * BLOCK)
        channels_TKHW = np.empty((num_frames, self.num_channels, *map_hw), np.float32)
        for channels_KHW, stored_Rhw in zip(channels_TKHW, stored_TRhw, strict=True):
            coefficients = np.zeros((self.num_channels * FREQUENCIES, h * w), np.float32)
            low_NS, high_PS = np.split(stored_Rhw.reshape(len(stored_Rhw), -1).astype(np.float32), [len(self.number_N)])
            low_NS[: self.num_wide] += DIGIT * high_PS
            coefficients[self.number_N] = low_NS
            channels_KHW[...] = from_blocks(coefficients.reshape(self.num_channels, FREQUENCIES, -1), map_hw)
        return channels_TKHW
