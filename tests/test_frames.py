from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import FingerprintMismatch, FrameError
from cache.labels.tracks import Video
from cache.media.geometry import Transform, network_size
from cache.reader import FeatureCache
from configs.schema import Decoder
from extract.decoding import decode_on, frame_decoder
from extract.demo.stills import make_still
from extract.frames import FrameFile, decoded_batches, load_frame, read_frame, require_frames
from extract.stage import extract
from tests.conftest import tiny_settings
from train_head.data.video_sets import open_evaluation_set


def save_jpeg(path: Path, height: int = 20, width: int = 30, **options: object) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("original", "edge", "expected"),
    [
        ((720, 1280), 360, (360, 640)),
        ((1280, 720), 360, (640, 360)),
        ((480, 854), 360, (360, 641)),  # 640.5 rounds up, as int(x + 0.5) does
        ((100, 1000), 360, (133, 1333)),  # capped by the longer edge: 360 / 2.7007 = 133.3
        ((90, 160), None, (90, 160)),
    ],
)
def test_network_size_worked_by_hand(original: tuple[int, int], edge: int | None, expected: tuple[int, int]) -> None:
    assert network_size(original, edge) == expected


def test_resizing_is_pillows_bilinear(tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "a.png")
    expected = np.asarray(Image.open(path).resize((15, 10), Image.Resampling.BILINEAR))
    assert torch.equal(
        load_frame(path, (20, 30), Transform.resize((20, 30), (10, 15))),
        torch.from_numpy(expected.copy()).permute(2, 0, 1),
    )


def test_grey_and_alpha_become_rgb_and_orientation_is_applied(tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.fromarray(np.full((4, 6), 7, dtype=np.uint8)).save(grey)
    assert np.asarray(read_frame(grey, (4, 6))).shape == (4, 6, 3)
    Image.fromarray(np.full((4, 6, 4), 9, dtype=np.uint8)).save(tmp_path / "alpha.png")
    assert read_frame(tmp_path / "alpha.png", (4, 6)).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = save_jpeg(tmp_path / "turned.jpg", 20, 30, exif=exif)
    assert read_frame(turned, (30, 20)).size == (20, 30)


def test_a_truncated_jpeg_is_one_clear_error(tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "cut.jpg", 200, 300)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(FrameError, match=r"cut.jpg.*not a readable image"):
        read_frame(path, (200, 300))


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(FrameError, match=r"x\.jpg"):
        read_frame(path, (2, 2))


def test_a_frame_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"expected 31x20, got 30x20"):
        read_frame(save_jpeg(tmp_path / "a.jpg"), (20, 31))


def test_missing_frames_are_found_before_any_work(tmp_path: Path) -> None:
    save_jpeg(tmp_path / "v" / "0.jpg")
    video = Video(id=1, width=30, height=20, length=2, file_names=("v/0.jpg", "v/1.jpg"))
    with pytest.raises(FrameError, match=r"1 frames .*v/1.jpg"):
        require_frames([video], tmp_path)
    with pytest.raises(FrameError, match="no such folder"):
        require_frames([video], tmp_path / "nowhere")


SHRUNK = Transform(crop=(6, 8, 80, 144), size=(53, 96), flip=True)


def smooth_jpeg(path: Path, mode: str = "RGB", **options: object) -> FrameFile:
    """A picture of 96 x 160, as natural ones are: a still of the demo's world."""
    Image.fromarray(make_still(1, (96, 160)).image).convert(mode).save(path, quality=92, **options)
    return FrameFile(group="1", path=path, original_hw=(96, 160), transform=SHRUNK)


def test_torchvision_decodes_and_resizes_as_pillow_does(tmp_path: Path) -> None:
    file = smooth_jpeg(tmp_path / "a.jpg")
    got, expected = frame_decoder(Decoder.torchvision, "cpu")(file), frame_decoder(Decoder.pillow, "cpu")(file)
    assert got.dtype == torch.uint8 and got.shape == expected.shape == (3, 53, 96)
    assert torch.equal(expected, file.load())
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 2 and difference.float().mean() < 0.25, (difference.max(), difference.float().mean())


@pytest.mark.parametrize("kind", ["grey", "cmyk", "turned", "png", "rotated"])
def test_what_is_no_plain_jpeg_is_left_to_pillow(tmp_path: Path, kind: str) -> None:
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 3
        file = smooth_jpeg(tmp_path / "a.jpg", exif=exif)
    elif kind == "rotated":
        file = smooth_jpeg(tmp_path / "a.jpg")
        file = replace(file, transform=replace(SHRUNK, rotation=7.0))
    else:
        name = "a.png" if kind == "png" else "a.jpg"
        file = smooth_jpeg(tmp_path / name, {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    assert torch.equal(decode_on(file, "cpu"), file.load())


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, -1, -40])
def test_a_broken_jpeg_is_the_same_error_with_torchvision(tmp_path: Path, kept: int) -> None:
    file = smooth_jpeg(tmp_path / "a.jpg")
    file.path.write_bytes(file.path.read_bytes()[:kept])
    with pytest.raises(FrameError) as expected:
        file.load()
    with pytest.raises(FrameError) as got:
        decode_on(file, "cpu")
    assert str(got.value) == str(expected.value)


def test_another_decoder_needs_another_cache(tiny_data: Path, tmp_path: Path) -> None:
    words = ("detector.decoder=torchvision", "detector.short_edge=64")
    extract(tiny_settings(tiny_data, tmp_path / "a", tmp_path, *words), only=["valid"])
    extract(tiny_settings(tiny_data, tmp_path / "b", tmp_path, words[1]), only=["valid"])
    ours, pillows = (FeatureCache.open(tmp_path / name / "valid") for name in "ab")
    assert ours.fingerprint == replace(pillows.fingerprint, decoder="torchvision")
    assert b'decoder":' not in (pillows.path / "zarr.json").read_bytes(), "as before there was a choice"
    got, expected = (each.video("1").mask_features().astype(np.float32) for each in (ours, pillows))
    assert np.abs(got - expected).mean() < 0.05 * np.abs(expected).mean()
    with pytest.raises(FingerprintMismatch, match="decoder of the frames: pillow here, torchvision there"):
        extract(tiny_settings(tiny_data, tmp_path / "b", tmp_path, *words), only=["valid"])
    with pytest.raises(FingerprintMismatch, match=r"set detector\.decoder=torchvision"):
        open_evaluation_set(tiny_settings(tiny_data, tmp_path / "a", tmp_path, words[1]))


def test_hints_are_settings_that_can_be_typed(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    other_size = tiny_settings(tiny_data, tiny_cache, tmp_path, "detector.short_edge=64")
    with pytest.raises(FingerprintMismatch, match=r"expected 64, got null\)(.|\n)*set detector\.short_edge=null,"):
        open_evaluation_set(other_size)


def frame_file(path: Path, group: str, height: int, width: int) -> FrameFile:
    hw = (height, width)
    return FrameFile(group=group, path=path, original_hw=hw, transform=Transform.resize(hw, hw))


def test_batches_keep_the_order_and_lose_nothing(tmp_path: Path) -> None:
    files = []
    for index in range(7):
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.full((4, 5, 3), index, dtype=np.uint8)).save(path)
        files.append(frame_file(path, "1", 4, 5))
    with ThreadPoolExecutor(2) as pool:
        batches = [images for _, images in decoded_batches(files, lambda hw: 3, pool)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(7))


def test_a_batch_holds_frames_of_several_videos_but_of_one_size(tmp_path: Path) -> None:
    files = []
    for number, (length, width) in enumerate([(3, 5), (2, 5), (2, 6), (1, 6)]):
        for frame in range(length):
            path = save_jpeg(tmp_path / f"{number}" / f"{frame}.png", 4, width)
            files.append(frame_file(path, str(number), 4, width))
    with ThreadPoolExecutor(2) as pool:
        batches = list(decoded_batches(files, lambda hw: 4 if hw == (4, 5) else 2, pool))
    assert [[file.group for file in owners] for owners, _ in batches] == [
        ["0", "0", "0", "1"],
        ["1"],
        ["2", "2"],
        ["3"],
    ]
    assert [tuple(images.shape) for _, images in batches] == [(4, 3, 4, 5), (1, 3, 4, 5), (2, 3, 4, 6), (1, 3, 4, 6)]
