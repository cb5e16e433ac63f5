"""The report's page in a real browser: light and dark, wide and narrow, and printed. See `make test-browser`."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_store
from browser import Browser
from browser_checks import COLLISIONS, CONTRAST, STICKING_OUT

from builder.report.gather import gather
from builder.report.render import html
from builder.report.results import Loss

pytestmark = pytest.mark.browser

WIDE, NARROW, NARROWEST = 1280, 390, 360
# Colours of a screenshot: how many differ, and the share of the most frequent. The browser reads its own PNG.
COLOURS = """
(async () => {
  const image = new Image();
  image.src = "data:image/png;base64,%s";
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const data = new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer);
  const seen = new Map();
  for (const pixel of data) seen.set(pixel, (seen.get(pixel) || 0) + 1);
  const [corner] = data;
  const light = c => (c & 255) + (c >> 8 & 255) + (c >> 16 & 255);
  return {width: image.width, height: image.height, colours: seen.size, corner: light(corner) / 765,
          most: Math.max(...seen.values()) / data.length};
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with every section, and one with names and answers that are too long for any screen."""
    root = tmp_path_factory.mktemp("pages")
    full = report_store.build(root / "full")
    report_store.evaluate(full)
    report_store.ask(full)
    report_store.put_benchmark(full)
    report_store.put_aiperf(full)
    losses = [Loss(f"model.layers.{n}", 0.001 * (n % 7 + 1)) for n in range(36)]
    whole = replace(gather(full), losses=losses)
    long = "an-endless-name-without-a-space-" * 12
    sample = {"prompt": long, "answer": f"{long}<b>你好</b>"}
    crowded = report_store.build(root / "crowded", gpu="cpu", sample=sample, warnings={long: 1}, link="long")
    report_store.evaluate(crowded, score=91.0, data=long)
    report_store.ask(crowded, task=long)
    report_store.put_benchmark(crowded, concurrency=tuple(2**n for n in range(12)))
    report_store.put_aiperf(crowded, concurrency=tuple(2**n for n in range(17)))
    model = replace(gather(crowded).model, id=long, gpu_title=long)
    texts = {"full": html(whole), "crowded": html(replace(gather(crowded), model=model, command=long))}
    for name, text in texts.items():
        (root / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: root / f"{name}.html" for name in texts}


def colours(browser: Browser) -> dict[str, Any]:
    shot = base64.b64encode(browser.screenshot()).decode()
    browser.open(Path("/dev/null"), width=WIDE, dark=False)
    found: dict[str, Any] = browser.evaluate(COLOURS % shot)
    return found


@pytest.mark.parametrize("page", ["full", "crowded"])
@pytest.mark.parametrize("width", [WIDE, NARROW, NARROWEST])
def test_it_renders_in_light_and_dark_and_never_scrolls_sideways(
    browser: Browser, pages: dict[str, Path], page: str, width: int
) -> None:
    seen = {}
    for dark in (False, True):
        browser.open(pages[page], width=width, dark=dark)
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate(STICKING_OUT) == []
        assert browser.requested == [pages[page].as_uri()], "it asks for nothing but itself"
        seen[dark] = colours(browser)
    for found in seen.values():
        assert found["width"] == width
        assert found["height"] > 1500
        assert found["colours"] > 200, "it is not blank: text and charts are drawn"
        assert found["most"] < 0.95
    assert seen[False]["corner"] > 0.9
    assert seen[True]["corner"] < 0.15
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", ["full", "crowded"])
def test_every_text_can_be_read(browser: Browser, pages: dict[str, Path], page: str, dark: bool) -> None:
    """Contrast is at least 4.5 (WCAG 2.2, 1.4.3), with all details open."""
    browser.open(pages[page], width=WIDE, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_charts_are_drawn_and_their_words_do_not_collide(browser: Browser, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["full"], width=width, dark=False)
    drawn = browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].filter(c => c.getClientRects().length).length"
    )
    assert drawn == 7 + 8
    assert browser.evaluate(COLLISIONS) == []
    bar = browser.evaluate("getComputedStyle(document.querySelector('.chart .bar')).fill")
    browser.open(pages["full"], width=width, dark=True)
    assert browser.evaluate("getComputedStyle(document.querySelector('.chart .bar')).fill") != bar


def test_a_wide_table_scrolls_in_its_box(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], width=NARROW, dark=False)
    box = browser.evaluate(
        "(() => { const b = document.querySelector('#accuracy .scroll'); return [b.scrollWidth, b.clientWidth]; })()"
    )
    assert box[0] > box[1]


def test_it_prints_on_white_even_in_the_dark(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], width=WIDE, dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate(CONTRAST) == []


def test_a_hostile_page_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    harm = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    link = report_store.build(tmp_path / "out", sample={"prompt": harm, "answer": harm}, warnings={harm: 1})
    page = tmp_path / "page.html"
    page.write_text(html(gather(link)), encoding="utf-8")
    browser.open(page, width=WIDE, dark=False)
    assert "owned" not in browser.evaluate("document.title")
    assert browser.evaluate("document.images.length + document.scripts.length") == 0
    assert re.search(r"<img src=x", browser.evaluate("document.querySelector('.sample').textContent"))
