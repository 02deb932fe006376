"""Images as frames: every mode and depth, orientation, order in folders and lists."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import FrameError
from cache.media.footage import look_through, read_record, write_record
from cache.media.image_files import images_in, read_rgb
from tests.video_samples import noise, write_mpeg4

GREY = noise(1, (6, 9))[0, ..., 0]
DEEP = GREY.astype(np.uint16) * 256 + 255  # the high byte counts, the low one is noise


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = noise(1, (6, 9))[0]
    alpha = np.concatenate([colour, GREY[..., None]], axis=-1)
    images = {
        "grey.png": (Image.fromarray(GREY), GREY[..., None]),
        "rgba.png": (Image.fromarray(alpha), colour),
        "la.png": (Image.fromarray(np.stack([GREY, GREY], axis=-1)), GREY[..., None]),
        "deep.png": (Image.fromarray(DEEP), GREY[..., None]),
        "deep.tif": (Image.fromarray(DEEP), GREY[..., None]),
        "deep.pgm": (Image.fromarray(DEEP), GREY[..., None]),
        "bit.png": (Image.fromarray(GREY > 127), (GREY[..., None] > 127) * 255),
        "palette.png": (Image.fromarray(GREY).convert("P"), GREY[..., None]),
        "colour.bmp": (Image.fromarray(colour), colour),
    }
    for name, (image, expected) in images.items():
        image.save(tmp_path / name)
        read = read_rgb(tmp_path / name, (6, 9))
        assert read.dtype == np.uint8 and np.array_equal(read, np.broadcast_to(expected, (6, 9, 3))), name


def test_cmyk_jpegs_have_their_colours(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    ink.save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_rgb(tmp_path / "a.jpg", (16, 16)).astype(int) - (255, 0, 0)).max() < 8


def test_exif_turns_size_and_picture(tmp_path: Path) -> None:
    lying = np.zeros((16, 32, 3), np.uint8)
    lying[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture has to be turned clockwise
    Image.fromarray(lying).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (footage,) = look_through(tmp_path)
    assert (footage.height, footage.width) == (32, 16)
    (upright,) = footage.frames()
    assert np.abs(upright.astype(int) - np.rot90(lying, -1)).max() < 8


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(FrameError, match="floating-point"):
        read_rgb(tmp_path / "a.tif", (4, 4))


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("f10.png", "f9.png", "f009b.png", "²1.png", ".hidden.png", "notes.md"):
        Image.new("L", (4, 4)).save(tmp_path / name, format="png")
    assert [path.name for path in images_in(tmp_path)] == ["f9.png", "f009b.png", "f10.png", "²1.png"]
    (footage,) = look_through(tmp_path, 2)
    assert [Path(image).name for image in footage.images] == ["f9.png", "f10.png"]
    assert footage.seconds == (0, 0.2)


def test_lists_name_images_or_videos(tmp_path: Path) -> None:
    for index, name in enumerate(("b.png", "a b.png")):
        Image.new("L", (4, 4), index).save(tmp_path / name)
    write_mpeg4(tmp_path / "v.mp4", noise(2, (16, 16)))
    listed = tmp_path / "list.txt"
    listed.write_text(f"b.png\n\n{tmp_path / 'a b.png'}\n")
    (footage,) = look_through(listed)
    assert [frame[0, 0, 0] for frame in footage.frames()] == [0, 1]
    listed.write_text("v.mp4\n.\n", encoding="utf-8-sig")  # as Windows' editors write it
    assert [(piece.name, len(piece.seconds)) for piece in look_through(listed)] == [("v", 2), (tmp_path.name, 2)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the list is empty"),
        ("gone.png", r"gone\.png: not a readable image: no such file"),
        ("gone", "no such"),
        ("list.txt", "a list within a list"),
    ],
)
def test_broken_lists(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(FrameError, match=words):
        look_through(tmp_path / "list.txt")


def test_empty_folders_odd_ones_out_and_broken_images(tmp_path: Path) -> None:
    (tmp_path / "clips" / "first").mkdir(parents=True)
    with pytest.raises(FrameError, match=r"no images(.|\n)*hint: .*`ls -d .*/clips/\* > videos.txt`"):
        look_through(tmp_path / "clips")
    shutil.rmtree(tmp_path / "clips")
    with pytest.raises(FrameError, match="no images"):
        look_through(tmp_path)
    Image.fromarray(noise(1, (40, 40))[0]).save(tmp_path / "1.jpg")
    Image.new("L", (4, 5)).save(tmp_path / "2.png")
    with pytest.raises(FrameError, match=r"2\.png.*expected 40x40, got 4x5"):
        look_through(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(FrameError, match=r"2\.png: not a readable image"):
        look_through(tmp_path)
    (tmp_path / "2.png").unlink()
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:-800])
    (footage,) = look_through(tmp_path)
    with pytest.raises(FrameError, match=r"1\.jpg: not a readable image"):
        list(footage.frames())


def test_the_record_of_footage_survives(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    footage = look_through(tmp_path)
    write_record(tmp_path, footage)
    assert read_record(tmp_path) == footage
