"""Decoding a video file with PyAV as a stream: upright frames, whatever is damaged left out and told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cache.errors import FrameError

MISSING_SECONDS = 0.5
"""How much earlier than its header says a file may end without a word; sound often outlasts the pictures."""
_USUAL_RATE = Fraction(25)  # where neither container nor codec knows one


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A frame of a file, still as the decoder gave it."""

    frame: VideoFrame
    seconds: float
    """Since the file's clock began; increasing from frame to frame, even where the file's stamps do not."""

    @property
    def hw(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        sideways = _orientation(self.frame)[0]
        height, width = self.frame.height, self.frame.width
        return (width, height) if sideways else (height, width)

    def rgb(self) -> NDArray[np.uint8]:
        """The upright picture (h, w, 3); alpha is dropped, deeper samples are rounded to 8 bits."""
        pixels = np.asarray(self.frame.to_ndarray(format="rgb24"), dtype=np.uint8)
        sideways, mirror_rows, mirror_columns = _orientation(self.frame)
        if sideways:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if mirror_rows else 1, :: -1 if mirror_columns else 1]


@dataclass
class Decoding:
    """One pass through a file. `problems` grows while frames are taken: what could not be used, in words."""

    path: Path
    problems: list[str] = field(default_factory=list)

    def frames(self) -> Iterator[Decoded]:
        """Decode the file's main video stream in order of presentation; memory stays at a few frames.

        Damaged frames are left out; frames of another size than the first end the video. Raises FrameError where
        PyAV finds no video in the file.
        """
        with _opened(self.path) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate or _USUAL_RATE
            size, seconds = None, 0.0
            for frame in self._whole_frames(container, stream):
                stamp = frame.time
                usable = size is None or (stamp is not None and stamp > seconds)
                seconds = (stamp or 0.0) if usable else seconds + float(1 / rate)
                decoded = Decoded(frame=frame, seconds=seconds)
                size = size or decoded.hw
                if decoded.hw != size:
                    self.problems.append(f"the picture's size changes at {seconds:.2f} s: left out from there on")
                    return
                yield decoded
            if size is not None:
                self._compare_duration(container, stream, seconds + float(1 / rate))

    def _whole_frames(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                self.problems.append(f"reading stops early: {error.strerror}")
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except FFmpegError as error:
                self.problems.append(f"a packet cannot be decoded: {error.strerror}")
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self.problems.append(f"the frame at {frame.time or 0:.2f} s is damaged")
                else:
                    yield frame

    def _compare_duration(self, container: InputContainer, stream: VideoStream, end: float) -> None:
        declared = None
        if stream.duration is not None and stream.time_base is not None:
            declared = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
        elif container.duration is not None:
            declared = (container.duration + (container.start_time or 0)) / av.time_base
        if declared is not None and declared - end > MISSING_SECONDS:
            self.problems.append(f"it ends at {end:.2f} s, but its header says {declared:.2f} s")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    hint = "give a video file that PyAV (FFmpeg) reads, a folder of images, or a .txt list of them"
    try:
        container = av.open(str(path))
    except FFmpegError as error:
        raise FrameError(f"not a readable video: {error.strerror}", where=path, hint=hint) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise FrameError("the file has no pictures", where=path, hint=hint)
        yield container, stream


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How a camera was held, from the display matrix: (transpose first, then mirror rows, mirror columns).

    The matrix (a, b, u, c, d, v, x, y, w) sends column p and row q to column a·p + c·q and row b·p + d·q
    (libavutil/display.h). Rounded to quarter turns.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(cast(bytes, data), np.int32)[:5].tolist()
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)
