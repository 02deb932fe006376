"""How a frame's file becomes the network's input: by Pillow, or by torchvision on the detector's device.

Pillow gives detectron2's exact pixels. torchvision (libjpeg-turbo on CPU, nvJPEG on CUDA) decodes JPEGs and resizes
them where the detector works, antialiased bilinear: other pixels, so another cache (`detector.decoder`, FORMAT.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cache.media.geometry import Transform
from configs.schema import Decoder
from extract.frames import FrameFile

_ORIENTATION = 0x0112  # EXIF
_END_OF_IMAGE = b"\xff\xd9"
Decode = Callable[[FrameFile], Tensor]
"""Gives a frame as (3, H, W) uint8; raises FrameError as FrameFile.load."""


def frame_decoder(decoder: Decoder, device: str) -> Decode:
    """What `detector.decoder` asks for."""
    return partial(decode_on, device=device) if decoder is Decoder.torchvision else FrameFile.load


def decode_on(file: FrameFile, device: str) -> Tensor:
    """Decode and transform a plain JPEG on a device; what is anything else, or broken, is left to Pillow."""
    if file.transform.rotation or not _is_plain(file):
        return file.load().to(device)
    from torchvision.io import ImageReadMode, decode_jpeg

    content = bytearray(file.path.read_bytes())
    if _END_OF_IMAGE not in content[-64:]:
        return file.load().to(device)
    try:
        image_CHW = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB, device)
    except RuntimeError:
        return file.load().to(device)
    return on_tensor(image_CHW, file.transform)


def on_tensor(image_CHW: Tensor, transform: Transform) -> Tensor:
    """As Transform.on_image, for uint8 tensors (3, h, w) and transforms without rotation."""
    from torchvision.transforms.v2.functional import resize

    top, left, height, width = transform.crop
    image_CHW = image_CHW[:, top : top + height, left : left + width]
    if image_CHW.shape[1:] != transform.size:
        image_CHW = resize(image_CHW, list(transform.size), antialias=True)
    return image_CHW.flip(-1) if transform.flip else image_CHW


def _is_plain(file: FrameFile) -> bool:
    """Whether the header is that of an upright JPEG in colour, of the labelled size."""
    try:
        with Image.open(file.path) as header:
            upright = header.getexif().get(_ORIENTATION, 1) == 1
            found = (header.format, header.mode, (header.height, header.width))
            return upright and found == ("JPEG", "RGB", file.original_hw)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return False
