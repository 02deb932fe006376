"""The report in a real browser: it opens, scrubs by keyboard, switches runs, says so to screen readers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import Settings
from tests.chromium import CHROMIUM, Page
from tests.report_run import HOSTILE, hostile_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: `apt-get install chromium`")

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


def test_sides_and_masks_switch_by_keyboard(page: Page) -> None:
    page.load()
    shown = "Array.from(document.querySelectorAll('.side[data-side=\"1\"]')).filter((s) => s.checkVisibility()).length"
    assert page.run(shown) == 2  # of two videos
    page.run("document.querySelector('#show input[value=\"1\"]').focus()")
    page.press(["Space"])
    assert page.run(shown) == 0
    page.press(["Space"])
    assert page.run(shown) == 2
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
    page.run("document.querySelector('.scrub button').click()")
    moves = f"const wait = () => {SLIDER}.value !== first ? done(true) : setTimeout(wait, 20); wait();"
    moved = f"new Promise((done) => {{ const first = {SLIDER}.value; {moves} }})"
    assert page.run(moved)
    page.run("document.querySelector('.scrub button').click()")
    assert page.run("document.querySelector('.scrub button').textContent") == "Play"
    assert page.run("document.querySelector('section.video').dataset.timer") is None


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    page.load()
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {"slider", "checkbox", "button", "image", "img", "region", "group", "table", "DisclosureTriangle"}
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in named - {"group"}]
    nameless = [node for node in seen if not node["name"]["value"]]
    assert nameless == [], nameless[:1]
    assert {node["role"]["value"] for node in seen} >= {"slider", "checkbox", "button", "table"}


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_follows_the_colour_scheme_and_text_stands_out(page: Page, scheme: str, dark: bool) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.load()
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    background = np.bincount(pixels.ravel()).argmax()
    assert (background < 60) if dark else (background > 240)
    assert np.abs(pixels.astype(int) - int(background)).max() > 180  # of the text
