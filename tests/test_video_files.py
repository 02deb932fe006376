"""Decoding video files: pictures, moments, orientation, and what is left of broken ones."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cache.errors import FrameError
from cache.media.footage import Footage, look_through
from cache.media.video_writer import TICKS, VideoWriter, encoder_name
from tests.video_samples import noise, turn_clockwise, write_lossless, write_mpeg4

STAMPS = (0, 40, 130, 150, 400, 1000)


def only(path: Path, stride: int = 1) -> Footage:
    (footage,) = look_through(path, stride)
    return footage


def test_frames_and_moments_of_a_variable_rate_and_odd_size(tmp_path: Path) -> None:
    frames = noise(6, (33, 47))
    footage = only(write_lossless(tmp_path / "a.mkv", frames, STAMPS, given="rgb24", stored="bgr0"))
    assert (footage.height, footage.width, footage.problem) == (33, 47, None)
    assert footage.seconds == pytest.approx([stamp / 1000 for stamp in STAMPS], abs=1e-9)
    assert np.array_equal(np.stack(list(footage.frames())), frames)


def test_moments_count_from_the_first_frame_and_strides_keep_theirs(tmp_path: Path) -> None:
    frames, late = noise(6, (16, 16)), [stamp + 5000 for stamp in STAMPS]
    footage = only(write_lossless(tmp_path / "a.mkv", frames, late, given="rgb24", stored="bgr0"), stride=2)
    assert footage.seconds == pytest.approx([0, 0.13, 0.4], abs=1e-9)
    assert np.array_equal(np.stack(list(footage.frames())), frames[::2])


@pytest.mark.parametrize(("given", "stored"), [("gray", "gray"), ("gray16le", "gray16le"), ("rgba", "bgra")])
def test_grey_deep_and_transparent_videos_become_rgb(tmp_path: Path, given: str, stored: str) -> None:
    red = noise(2, (20, 30))[..., 0]
    pixels = {"gray": red, "gray16le": red.astype(np.uint16) * 257, "rgba": np.repeat(red[..., None], 4, axis=-1)}
    footage = only(write_lossless(tmp_path / "a.mkv", pixels[given], [0, 40], given=given, stored=stored))
    read = np.stack(list(footage.frames())).astype(int)
    assert read.shape == (2, 20, 30, 3)
    assert np.abs(read - red[..., None].astype(int)).max() <= 1


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_camera_gives_upright_frames(tmp_path: Path, quarters: int) -> None:
    lying = np.zeros((1, 32, 48, 3), np.uint8)
    lying[0, :16, :24], lying[0, :16, 24:], lying[0, 16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    footage = only(turn_clockwise(write_mpeg4(tmp_path / "a.mp4", lying), quarters))
    expected = np.rot90(lying[0], -quarters).astype(int)
    (upright,) = footage.frames()
    assert (footage.height, footage.width) == upright.shape[:2] == expected.shape[:2]
    assert np.median(np.abs(upright - expected)) < 12


@pytest.mark.parametrize(("name", "word"), [("a.mkv", "header says"), ("a.ts", "damaged"), ("a.mp4", "header says")])
def test_a_broken_tail_yields_what_came_before_and_says_so(tmp_path: Path, name: str, word: str) -> None:
    whole = write_mpeg4(tmp_path / name, noise(30, (48, 64)), movflags="faststart")
    assert only(whole).problem is None and len(only(whole).seconds) == 30
    intact = list(only(whole).frames())
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    footage = only(whole)
    kept = len(footage.seconds)
    assert 10 < kept < 25
    assert footage.problem is not None and word in footage.problem
    assert all(np.array_equal(a, b) for a, b in zip(footage.frames(), intact[: kept - 1], strict=False))


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 50, bytes(range(256)) * 40])
def test_what_is_no_video_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(FrameError, match=r"x\.mp4: not a readable video"):
        look_through(path)
    with pytest.raises(FrameError, match="no such file"):
        look_through(tmp_path / "nowhere.mp4")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(FrameError, match="no pictures"):
        look_through(path)


def test_a_file_that_changed_after_it_was_looked_through(tmp_path: Path) -> None:
    path = write_lossless(tmp_path / "a.mkv", noise(6, (16, 16)), STAMPS, given="rgb24", stored="bgr0")
    footage = only(path)
    write_lossless(path, 255 - noise(6, (16, 16)), STAMPS, given="rgb24", stored="bgr0")
    with pytest.raises(FrameError, match=r"a\.mkv: the pictures have changed[\s\S]*old files back"):
        list(footage.frames())


def test_written_videos_keep_moments_sizes_and_pictures(tmp_path: Path) -> None:
    frames = np.repeat(np.repeat(noise(6, (4, 6)), 8, axis=1), 8, axis=2)[:, :-1, :-1]  # 31 x 47, smooth enough
    with VideoWriter(tmp_path / "a.mp4", (31, 47)) as writer:
        for frame, stamp in zip(frames, STAMPS, strict=True):
            writer.add(frame, stamp / 1000)
    footage = only(tmp_path / "a.mp4")
    assert (footage.height, footage.width) == (32, 48)
    assert footage.seconds == pytest.approx([stamp / 1000 for stamp in STAMPS], abs=1 / TICKS)
    difference = np.stack(list(footage.frames()))[:, :31, :47].astype(int) - frames
    assert np.median(np.abs(difference)) < 30  # chroma at half resolution
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == ("h264" if encoder_name() == "libx264" else "mpeg4")
    assert Fraction(30_000, 1001) ** -1 * TICKS == 2002


def test_a_failed_writer_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", (16, 16)) as writer:
        writer.add(noise(1, (16, 16))[0], 0.0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
