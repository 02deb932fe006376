"""Tiny video files, written with PyAV frame by frame."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def noise(num_frames: int, hw: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    """Frames (T, h, w, 3) that no codec finds easy."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *hw, 3), dtype=np.uint8)


def write_lossless(
    path: Path, frames: NDArray[np.uint8] | NDArray[np.uint16], milliseconds: Sequence[int], *, given: str, stored: str
) -> Path:
    """FFV1: what is read is what was written. `given`, `stored`: pixel formats."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1")
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], stored
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, stamp in zip(frames, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format=given)
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_mpeg4(path: Path, frames: NDArray[np.uint8], **container_options: str) -> Path:
    """MPEG-4 part 2 at 10 frames a second: lossy, in any container, with any build of FFmpeg."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def turn_clockwise(path: Path, quarters: int) -> Path:
    """Write a rotation into the track header of an .mp4, as a phone does (ISO/IEC 14496-12, 8.3.2)."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    assert content[start : start + 36] == struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content[start : start + 36] = matrix
    path.write_bytes(content)
    return path
