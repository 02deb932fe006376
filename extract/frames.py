"""Reading the frames of a data set: found, decoded, checked against the labels, resized as the original does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache.errors import FrameError, some
from cache.labels.tracks import Video
from cache.layout import Size
from cache.media.geometry import Transform
from cache.media.image_files import open_rgb

_AHEAD = 4  # decoded batches of the first one's size that may wait for the detector


def require_frames(videos: Sequence[Video], folder: Path) -> None:
    """Check that every frame file exists, before any work; raises FrameError naming the first few missing."""
    require_files((name for video in videos for name in video.file_names), folder)


def require_files(names: Iterable[str], folder: Path) -> None:
    """As require_frames, for files by their names."""
    if not folder.is_dir():
        raise FrameError("no such folder of frames", where=folder, hint="check data.root and data.*_frames")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FrameError(
            f"{len(missing)} frames named by the labels are not there: {some(missing)}",
            where=folder,
            hint="check data.root and data.*_frames, or fetch the missing files",
        )


def read_frame(path: Path, expected_hw: Size) -> Image.Image:
    """Decode one frame as RGB. Raises FrameError as open_rgb, and where it has not the labelled (height, width)."""
    image = open_rgb(path)
    if (image.height, image.width) != expected_hw:
        raise FrameError(
            "the frame's size differs from the labels'",
            where=path,
            expected=f"{expected_hw[1]}x{expected_hw[0]}",
            got=f"{image.width}x{image.height}",
        )
    return image


def load_frame(path: Path, original_hw: Size, transform: Transform) -> Tensor:
    """Read one frame and transform it to a (3, H, W) uint8 tensor; resizing is Pillow's bilinear, as detectron2's."""
    return torch.from_numpy(np.array(transform.on_image(read_frame(path, original_hw)))).permute(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class FrameFile:
    """A frame to come: its file, its (height, width) there, and what the detector is shown of it."""

    group: str
    """Of the cache: what the frame is extracted for."""
    path: Path
    original_hw: Size
    transform: Transform

    def load(self) -> Tensor:
        """See load_frame."""
        return load_frame(self.path, self.original_hw, self.transform)


def decoded_batches(
    files: Iterable[FrameFile],
    batch_frames: Callable[[Size], int],
    pool: ThreadPoolExecutor,
    decode: Callable[[FrameFile], Tensor] = FrameFile.load,
) -> Iterator[tuple[list[FrameFile], Tensor]]:
    """Yield frames in order as (b, 3, H, W) uint8, decoded ahead in the pool's threads.

    A batch holds frames of one size, of several videos where they follow each other: b is `batch_frames` of that
    (height, width), but fewer at the end, where the size changes, and before an unreadable frame, whose FrameError is
    raised by the next batch.
    """
    coming = ((file, pool.submit(decode, file)) for file in files)
    waiting = deque(islice(coming, 1))
    if waiting:
        waiting.extend(islice(coming, _AHEAD * batch_frames(waiting[0][0].transform.size) - 1))
    while waiting:
        batch = [waiting.popleft()]
        waiting.extend(islice(coming, 1))
        count = batch_frames(batch[0][0].transform.size)
        while waiting and len(batch) < count and _together(batch[0][0], *waiting[0]):
            batch.append(waiting.popleft())
            waiting.extend(islice(coming, 1))
        yield [file for file, _ in batch], torch.stack([decoded.result() for _, decoded in batch])


def _together(first: FrameFile, file: FrameFile, decoded: Future[Tensor]) -> bool:
    return file.transform.size == first.transform.size and decoded.exception() is None
