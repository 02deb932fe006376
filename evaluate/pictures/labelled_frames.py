"""Frames with their tracks drawn in: masks, and labels that can be read whatever the size of the video."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from evaluate.pictures.overlays import PALETTE, DrawnTrack, draw_frame

_FONT = Path("fonts/ttf/DejaVuSans-Bold.ttf")  # of matplotlib: Latin, Greek, Cyrillic
_SHORT_EDGE, _LONG_EDGE = 480, 1920  # pixels; small videos are enlarged until labels have room
_LINES = 24  # of text that fit above each other
_SHEET_COLUMNS, _SHEET_WIDTH, _SHEET_GAP = 4, 360, 6

Box = tuple[float, float, float, float]


def enlargement(hw: tuple[int, int]) -> int:
    """By how much a video of this size is enlarged before it is written on."""
    return max(1, min(-(-_SHORT_EDGE // min(hw)), _LONG_EDGE // max(hw)))


def draw_labelled(image: NDArray[np.uint8], tracks: Sequence[DrawnTrack], frame: int) -> NDArray[np.uint8]:
    """Draw the tracks of one frame over its image (h, w, 3), enlarged; a track keeps its colour in all frames.

    Every label stands in a box of its track's colour, where the mask's box begins or below a label already there.
    """
    scale = enlargement((image.shape[0], image.shape[1]))
    canvas = Image.fromarray(draw_frame(image, tracks, frame))
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.BICUBIC)
    pen, taken = ImageDraw.Draw(canvas), list[Box]()
    for index, track in enumerate(tracks):
        rle = track.segmentations[frame]
        if rle is not None:
            left, top, _, _ = (scale * edge for edge in coco_mask.toBbox(rle.to_json()).tolist())
            taken.append(_write(pen, track.caption, PALETTE[index % len(PALETTE)], (left, top), canvas.size, taken))
    return np.asarray(canvas)


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    colour: tuple[int, int, int],
    place: tuple[float, float],
    size: tuple[int, int],
    taken: Sequence[Box],
) -> Box:
    font = _fitting(text, size)
    width, height = font.getlength(text) + font.size // 2, font.size * 1.25
    x = max(0.0, min(place[0], size[0] - width))
    y = max(0.0, min(place[1] - height, size[1] - height))
    while any(x < box[2] and box[0] < x + width and y < box[3] and box[1] < y + height for box in taken):
        y += height  # each step passes a label, so that this ends
    if y + height > size[1]:
        y = max(0.0, size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    dark = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 128
    pen.text((x + font.size // 4, y + height / 2), text, fill="black" if dark else "white", font=font, anchor="lm")
    return x, y, x + width, y + height


def _fitting(text: str, size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """The usual font, or a smaller one for a text that is wider than the picture."""
    font = _font(max(12, min(size) // _LINES))
    room = size[0] - font.size / 2
    return font if font.getlength(text) <= room else _font(max(6, int(font.size * room / font.getlength(text))))


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / _FONT), pixels)


def contact_sheet(pictures: Sequence[tuple[float, NDArray[np.uint8]]]) -> Image.Image:
    """A grid of pictures (seconds, image (h, w, 3)) of one size, each with its moment below."""
    height, width, _ = pictures[0][1].shape
    cell = (_SHEET_WIDTH, max(1, round(_SHEET_WIDTH * height / width)))
    font, step = _font(16), (cell[0] + _SHEET_GAP, cell[1] + 22 + _SHEET_GAP)
    columns = min(_SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * step[0] + _SHEET_GAP, rows * step[1] + _SHEET_GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (seconds, picture) in enumerate(pictures):
        x, y = _SHEET_GAP + index % columns * step[0], _SHEET_GAP + index // columns * step[1]
        sheet.paste(Image.fromarray(picture).resize(cell, Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + cell[1] + 3), f"{int(seconds) // 60}:{seconds % 60:05.2f}", fill="black", font=font)
    return sheet
