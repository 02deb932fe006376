"""The report in a real browser: it opens, scrubs by keyboard, switches runs, says so to screen readers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import Settings
from evaluate.compare.groups import read_groups
from evaluate.compare.report import write_comparison
from evaluate.compare.result import compare
from tests.chromium import Page, needs_chromium
from tests.report_run import HOSTILE, hostile_run

pytestmark = needs_chromium

SLIDER = "document.querySelector('section.video input[type=range]')"
PICTURE = "document.querySelectorAll('section.video')[0].querySelectorAll('.side')[1].querySelectorAll('img')"


@pytest.fixture(scope="module")
def page(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("browser")
    report = hostile_run(tiny_data, tiny_cache, tiny_run, folder)
    with Page(report, folder / "profile") as opened:
        yield opened


def test_it_opens_without_errors_requests_or_foreign_scripts(page: Page) -> None:
    page.load()
    assert page.run("document.title") == "vita-cache: tiny"
    assert page.run("Array.from(document.images).every((image) => image.complete && image.naturalWidth > 0)")
    assert HOSTILE in page.run("document.querySelector('.legend').innerText + document.body.innerText")
    assert page.messages == [] and page.requests == []


def test_the_arrow_keys_scrub(page: Page) -> None:
    page.load()
    before = page.run(f"[{SLIDER}.value, {PICTURE}[0].src, {PICTURE}[0].alt, document.querySelector('output').value]")
    page.run(f"{SLIDER}.focus()")
    page.press(["ArrowRight"])
    after = page.run(f"[{SLIDER}.value, {PICTURE}[0].src, {PICTURE}[0].alt, document.querySelector('output').value]")
    assert int(after[0]) == int(before[0]) + 1
    assert all(new != old for new, old in zip(after, before, strict=True))
    assert after[3] == page.run(f"{SLIDER}.getAttribute('aria-valuetext')") == f"frame {int(after[0]) + 1} of 6"
    assert after[2].startswith(f"head, {after[3]} of ")
    page.press(["ArrowLeft"])
    assert page.run(f"{PICTURE}[0].src") == before[1]
    assert page.messages == []


def test_sides_runs_and_masks_switch_by_keyboard(page: Page) -> None:
    page.load()
    shown = (
        "Array.from(document.querySelectorAll('section.video')).map((video) => Array.from("
        "video.querySelectorAll('.side')).filter((side) => side.checkVisibility())"
        ".map((side) => side.querySelector('b').innerText))"
    )
    every = ["ground truth", "head", "baseline", "other"]
    assert page.run(shown) == [every, every]  # of two videos
    for side in ("1", "3"):  # the run's head, the other run
        page.run(f"document.querySelector('#show input[value=\"{side}\"]').focus()")
        page.press(["Space"])
        left = [title for title in every if title != every[int(side)]]
        assert page.run(shown) == [left, left]
        page.press(["Space"])
        assert page.run(shown) == [every, every]
    masks = Image.open(io.BytesIO(_first_picture(page)))
    page.run("document.querySelector('#show input[name=masks]').click()")
    bare = Image.open(io.BytesIO(_first_picture(page)))
    assert np.abs(np.asarray(masks).astype(int) - np.asarray(bare)).max() > 30
    assert page.messages == []


def _first_picture(page: Page) -> bytes:
    page.run("document.querySelector('.picture').scrollIntoView()")
    return page.screenshot()


def test_play_moves_on_and_pauses(page: Page) -> None:
    page.load()
    live = "document.querySelector('output').getAttribute('aria-live')"
    said = page.run(f"{SLIDER}.getAttribute('aria-valuetext')")
    page.run("document.querySelector('.scrub button').click()")
    moves = f"const wait = () => {SLIDER}.value !== first ? done(true) : setTimeout(wait, 20); wait();"
    moved = f"new Promise((done) => {{ const first = {SLIDER}.value; {moves} }})"
    assert page.run(moved)
    assert page.run(live) == "off" and page.run(f"{SLIDER}.getAttribute('aria-valuetext')") == said
    assert page.run("document.querySelector('.scrub button').innerText").startswith("Pause")
    page.run("document.querySelector('.scrub button').click()")
    assert page.run("document.querySelector('.scrub button').innerText").startswith("Play")
    assert page.run(live) == "polite"
    assert page.run(f"{SLIDER}.getAttribute('aria-valuetext') === document.querySelector('output').value")
    assert page.run("document.querySelector('section.video').dataset.timer") is None


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    page.load()
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {"slider", "checkbox", "button", "image", "img", "region", "group", "table", "DisclosureTriangle"}
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in named - {"group"}]
    nameless = [node for node in seen if not node["name"]["value"]]
    assert nameless == [], nameless[:1]
    for role in ("slider", "button", "checkbox", "table", "image"):
        names = [node["name"]["value"] for node in seen if node["role"]["value"] == role]
        assert len(set(names)) == len(names), role
    assert page.run("Array.from(document.querySelectorAll('.chart figcaption')).length") >= 4
    captions = [node for node in nodes if node["role"]["value"] == "Figcaption" and not node["ignored"]]
    assert len(captions) >= 4  # a figure that is one image as a whole would hide them
    assert {"navigation", "main"} <= {node["role"]["value"] for node in nodes if not node["ignored"]}
    assert {node["role"]["value"] for node in seen} >= {"slider", "checkbox", "button", "table"}


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_follows_the_colour_scheme_and_text_stands_out(page: Page, scheme: str, dark: bool) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.load()
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    background = np.bincount(pixels.ravel()).argmax()
    assert (background < 60) if dark else (background > 240)
    assert np.abs(pixels.astype(int) - int(background)).max() > 180  # of the text


def test_on_paper_every_table_is_open(page: Page) -> None:
    page.call("Emulation.setEmulatedMedia", media="print", features=[])
    page.load()
    seen = "Array.from(document.querySelectorAll('main table')).map((table) => table.checkVisibility())"
    assert not all(page.run(seen)) and not page.run("document.querySelector('#show').checkVisibility()")
    page.run(f"addEventListener('beforeprint', () => {{ window.printed = {seen}; }})")
    pdf = base64.b64decode(page.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and all(page.run("window.printed"))
    assert not all(page.run(seen))  # closed again
    page.call("Emulation.setEmulatedMedia", media="", features=[])
    assert page.messages == []


def test_the_comparison_opens_without_errors_or_requests(page: Page) -> None:
    report, folder = page.file, page.file.parents[1]
    groups = read_groups([f"this={folder / 'tiny'}", f"that={folder / 'other'}"], [])
    page.file = write_comparison(compare(groups, resamples=2), groups, folder / "compared").html
    page.load()
    assert page.run("document.title") == "vita-cache: this against that"
    assert HOSTILE in page.run("document.body.innerText")
    assert page.run("Array.from(document.images).every((image) => image.complete && image.naturalWidth > 0)")
    assert page.run("document.images.length") > 0 and page.messages == [] and page.requests == []
    page.file = report
