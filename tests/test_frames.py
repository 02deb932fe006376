from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import FrameError
from cache.labels.tracks import Video
from cache.media.geometry import Transform, network_size
from extract.frames import FrameFile, decoded_batches, load_frame, read_frame, require_frames


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
        batches = [images for _, images in decoded_batches(files, 3, pool)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(7))


def test_a_batch_holds_frames_of_several_videos_but_of_one_size(tmp_path: Path) -> None:
    files = []
    for number, (length, width) in enumerate([(3, 5), (2, 5), (2, 6), (1, 6)]):
        for frame in range(length):
            path = save_jpeg(tmp_path / f"{number}" / f"{frame}.png", 4, width)
            files.append(frame_file(path, str(number), 4, width))
    with ThreadPoolExecutor(2) as pool:
        batches = list(decoded_batches(files, 4, pool))
    assert [[file.group for file in owners] for owners, _ in batches] == [["0", "0", "0", "1"], ["1"], ["2", "2", "3"]]
    assert [tuple(images.shape) for _, images in batches] == [(4, 3, 4, 5), (1, 3, 4, 5), (3, 3, 4, 6)]
