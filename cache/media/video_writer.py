"""Writing pictures as an .mp4 that plays everywhere, each at its own moment."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.codec.codec import Codec, UnknownCodecError
from av.video.frame import VideoFrame
from numpy.typing import NDArray

TICKS = 60_000
"""A second. MPEG-4 admits no more than 65,535; the usual frame rates, 30,000/1,001 too, are whole numbers of these."""
_MPEG4_BITS_PER_PIXEL = 2


class VideoWriter:
    """Encodes frames one by one, as H.264 where this build of FFmpeg can, else as MPEG-4.

    The file appears under its name when the `with` block is left without an error.
    """

    def __init__(self, path: Path, hw: tuple[int, int]) -> None:
        self._path, self._draft = path, path.with_name(path.name + ".tmp")
        self._even = (hw[0] + hw[0] % 2, hw[1] + hw[1] % 2)  # of what the codecs take; the last row is repeated
        self._last = -1

    def __enter__(self) -> VideoWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._draft), "w", format="mp4", options={"movflags": "faststart"})
        codec = encoder_name()
        options = {"crf": "18", "preset": "veryfast"} if codec == "libx264" else {}
        stream: Any = self._container.add_stream(codec, options=options)
        stream.height, stream.width, stream.pix_fmt = *self._even, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        if codec == "mpeg4":
            stream.bit_rate = _MPEG4_BITS_PER_PIXEL * self._even[0] * self._even[1]
        self._stream = stream
        return self

    def add(self, image: NDArray[np.uint8], seconds: float) -> None:
        """Append a picture (h, w, 3), shown `seconds` after the beginning; later ones need later moments."""
        below, right = self._even[0] - image.shape[0], self._even[1] - image.shape[1]
        whole = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge") if below or right else image
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")
        frame.pts = self._last = max(self._last + 1, round(seconds * TICKS))
        frame.time_base = Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
        if error is None:
            self._draft.replace(self._path)
        else:
            self._draft.unlink(missing_ok=True)


def encoder_name() -> str:
    """The best encoder that this build of FFmpeg has."""
    try:
        return Codec("libx264", "w").name
    except UnknownCodecError:
        return "mpeg4"
