from __future__ import annotations

import jinja2
import numpy as np
import pytest

from cache import masks
from evaluate.overlays import PALETTE, DrawnTrack, draw_frame
from evaluate.page import render
from evaluate.tables import metrics_table, percent


def test_masks_are_drawn_in_their_tracks_colour_and_the_first_lies_on_top() -> None:
    image = np.full((9, 9, 3), 100, dtype=np.uint8)
    left, whole = np.zeros((9, 9), dtype=np.uint8), np.ones((9, 9), dtype=np.uint8)
    left[:, :5] = 1
    tracks = [
        DrawnTrack(caption="a", segmentations=(masks.encode(left), None)),
        DrawnTrack(caption="b", segmentations=(masks.encode(whole), masks.encode(whole))),
    ]
    drawn = draw_frame(image, tracks, 0)
    assert np.array_equal(drawn[4, 2], (100 + np.array(PALETTE[0])) // 2)
    assert np.array_equal(drawn[4, 7], (100 + np.array(PALETTE[1])) // 2)
    assert np.array_equal(drawn[4, 4], PALETTE[0])  # the edge of the first
    later = draw_frame(image, tracks, 1)  # the first track is absent, and colours stay
    assert np.array_equal(later[4, 2], (100 + np.array(PALETTE[1])) // 2)
    assert np.array_equal(image, np.full((9, 9, 3), 100))


def test_tables_print_percentages() -> None:
    row = {"AP": 0.1234, "AP50": None, "AP75": 1.0, "AR1": 0.0, "AR10": 0.5}
    header, line = metrics_table({"head": row}).splitlines()
    assert header.split() == ["AP", "AP50", "AP75", "AR1", "AR10"]
    assert line.split() == ["head", "12.3", "-", "100.0", "0.0", "50.0"]
    assert percent(0.9999) == "100.0"


def test_names_are_escaped_in_the_page() -> None:
    empty = {"headline": (), "rows": {}, "categories": {}, "costs": [], "curves": None, "videos": []}
    page = render(
        "report.html.j2",
        name="<script>alert(1)</script>",
        split="valid",
        settings="a: <b>",
        fingerprint={"<i>": "<u>"},
        **empty,
    )
    assert "<script>" not in page and "&lt;script&gt;" in page and "<i>" not in page and "<u>" not in page
    with pytest.raises(jinja2.UndefinedError):
        render("report.html.j2", name="x")
