"""What codecs are judged on, and which one is chosen by it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.rate_distortion import (
    CALIBRATION,
    Calibration,
    Distortion,
    choice_in_words,
    format_table,
    read_calibration,
    smallest_faithful,
    write_calibration,
)
from cache.errors import AnnotationError, ConfigError, CorruptData, FrameError
from cache.labels.annotations import load_labels
from cache.labels.tracks import Video
from configs.load import load_settings
from extract.calibration import CalibrationFrames, draw_frames
from extract.detector_masks import QueryPredictions
from extract.distortion import DistortionMeter, JudgedFrame
from extract.stage import extract
from tests.conftest import tiny_settings


def test_frames_are_spread_over_the_videos(tiny_data: Path) -> None:
    videos = load_labels(tiny_data / "train.json").videos
    drawn = draw_frames(videos, 12)
    assert drawn == draw_frames(videos, 12)
    counts = [[sum(video.id == chosen.id for chosen, _ in side) for video in videos] for side in sides(drawn)]
    assert [sorted(count) for count in counts] == [[0, 0, 2, 3, 3], [0, 0, 0, 2, 2]]
    assert all(0 <= frame < video.length for side in sides(drawn) for video, frame in side)
    assert drawn.in_words().startswith("codecs are fitted to 8 frames of 3 videos, and judged on 4 frames of 2 others")


def sides(drawn: CalibrationFrames) -> tuple[list[tuple[Video, int]], list[tuple[Video, int]]]:
    return drawn.fitted, drawn.held_out


def videos_of(*lengths: int) -> list[Video]:
    return [
        Video(id=index, width=8, height=8, length=length, file_names=tuple(f"{index}/{t}.jpg" for t in range(length)))
        for index, length in enumerate(lengths)
    ]


def drawn_of(lengths: tuple[int, ...], num_frames: int) -> tuple[list[tuple[int, int]], ...]:
    return tuple(sorted((v.id, t) for v, t in side) for side in sides(draw_frames(videos_of(*lengths), num_frames)))


def test_frames_to_judge_on_are_of_other_videos_and_none_is_drawn_twice() -> None:
    # NumPy's permutation of 3 from seed 0 is 2, 0, 1: every third one, number 2, is held out.
    assert drawn_of((2, 1, 3), 96) == ([(0, 0), (0, 1), (1, 0)], [(2, 0), (2, 1), (2, 2)])
    fitted, held_out = drawn_of((9, 9, 9), 6)
    assert ([video for video, _ in fitted], [video for video, _ in held_out]) == ([0, 0, 1, 1], [2, 2])
    fitted, held_out = drawn_of((1,) * 300, 96)
    assert (len(fitted), len(held_out), len({*fitted, *held_out})) == (64, 32, 96)


def test_a_single_video_is_judged_on_its_last_third() -> None:
    assert drawn_of((6,), 96) == ([(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 4), (0, 5)])
    assert drawn_of((2,), 96) == ([(0, 0)], [(0, 1)])
    assert drawn_of((1,), 96) == ([(0, 0)], [(0, 0)])
    words = [draw_frames(videos_of(length), 96).in_words() for length in (6, 1)]
    assert words[0].endswith("fitted to 4 frames of 1 videos, and judged on 2 later frames of the same")
    assert words[1].startswith("warning: codecs are judged on the frame that they are fitted to")


def test_frames_to_judge_codecs_on_that_cannot_be_read(tiny_data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_data, tmp_path / "data")
    drawn = draw_frames(load_labels(root / "train.json").videos, 2)
    words = ("cache.codec=auto", "cache.calibration_frames=2", "extract.skip_errors=true")
    for side, what in ((drawn.fitted, "fitted to"), (drawn.held_out, "judged on")):
        shutil.copytree(tiny_data, root, dirs_exist_ok=True)
        for name in side[0][0].file_names:
            (root / "train/JPEGImages" / name).write_bytes(b"broken")
        with pytest.raises(FrameError, match=rf"{what} can be read[\s\S]*cache.codec=float16"):
            extract(tiny_settings(root, tmp_path / "features", tmp_path, *words))
    words = ("cache.codec=int8", "cache.calibration_frames=4", "extract.skip_errors=true", "extract.allow_skipped=true")
    extract(tiny_settings(root, tmp_path / "features", tmp_path, *words), only=["train"])
    calibration = read_calibration(tmp_path / "features/train")
    assert calibration is not None and (calibration.fitted_frames, calibration.held_out_frames) == (2, 1)
    with pytest.raises(AnnotationError, match="no videos"):
        draw_frames([], 4)


def test_without_a_mask_to_judge_by_the_most_faithful_codec_is_taken() -> None:
    map_CHW = np.random.default_rng(0).normal(size=(4, 6, 6)).astype(np.float32)
    queries = QueryPredictions(
        embeddings_QF=np.ones((1, 4), np.float32),
        constant_Q=np.full(1, -100, np.float32),
        object_probability_Q=np.ones(1, np.float32),
    )
    frame = JudgedFrame(
        map_CHW=map_CHW,
        image_hw=(24, 24),
        logits_NHW=map_CHW.sum(axis=0, keepdims=True) - 100,
        masks_Nhw=np.zeros((1, 24, 24), bool),
        stored_queries=queries,
        query_bytes=0,
    )
    coarse = Int8(step_C=np.full(4, 0.5, np.float32), offset_C=np.zeros(4, np.float32))
    rows = []
    for codec in (coarse, Float16()):
        meter = DistortionMeter(codec, "", np.zeros(4))
        meter.add(frame)
        rows.append(meter.result())
    assert [row.mask_iou for row in rows] == [0, 0]
    assert smallest_faithful(rows, 0.99) == 1


def row(codec: str, size: float, iou: float) -> Distortion:
    return Distortion(
        codec=codec,
        setting="",
        stored_channels=1,
        bytes_per_frame=size,
        feature_error=0.1,
        logit_error=0.1,
        mask_iou=iou,
        mask_iou_p5=iou,
        encode_ms=1,
        decode_ms=1,
    )


ROWS = (row("a", 10, 0.95), row("b", 20, 0.991), row("c", 30, 0.985), row("d", 40, 0.999))


@pytest.mark.parametrize(("threshold", "expected"), [(0.9, 0), (0.99, 1), (0.995, 3), (1.0, 3)])
def test_the_smallest_faithful_codec_is_chosen(threshold: float, expected: int) -> None:
    assert smallest_faithful(ROWS, threshold) == expected


@pytest.mark.parametrize(
    ("chosen", "threshold", "automatic", "words"),
    [
        (1, 0.99, True, r"^codec: b, the smallest that keeps 0.99 \(mean mask IoU 0.9910 on 4 held-out frames"),
        (3, 1.0, True, r"^warning: NO CODEC keeps cache.min_mask_iou=1; the most faithful one is taken: d \(.*0.9990"),
        (
            0,
            0.99,
            False,
            r"^codec: a, as cache.codec says \(.*0.9500.*\nwarning: .*min_mask_iou=0.99; .*auto takes b \(0.9910",
        ),
        (1, 0.99, False, r"^codec: b, as cache.codec says \([^\n]*$"),
    ],
)
def test_the_choice_is_told_in_words(chosen: int, threshold: float, automatic: bool, words: str) -> None:
    calibration = Calibration(rows=ROWS, chosen=chosen, min_mask_iou=threshold, fitted_frames=8, held_out_frames=4)
    assert re.search(words, choice_in_words(calibration, automatic))


def test_the_table_survives_the_disk(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    calibration = Calibration(rows=ROWS, chosen=1, min_mask_iou=0.99, fitted_frames=8, held_out_frames=4)
    write_calibration(tmp_path, calibration)
    assert read_calibration(tmp_path) == calibration
    assert [line[0] for line in format_table(calibration).splitlines()[2:]] == [" ", "*", " ", " "]
    (tmp_path / CALIBRATION).write_text('{"rows": [{}]}')
    with pytest.raises(CorruptData, match="calibration"):
        read_calibration(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "cache.codec=int4",
        "cache.min_mask_iou=1.5",
        "cache.logit_step=0",
        "cache.identity_share=0",
        "cache.calibration_frames=1",
    ],
)
def test_impossible_codec_settings_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_settings("demo", [override])
