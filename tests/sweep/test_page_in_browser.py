"""A sweep's page in a real browser: light and dark, wide and narrow. See `make test-browser`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from browser_checks import COLLISIONS, CONTRAST, STICKING_OUT
from sweep_results import result, served

from builder.sweep import measured, page

pytestmark = pytest.mark.browser

WIDE, NARROW = 1280, 360


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, a point that failed and a name that is too long for any screen."""
    axes = ["original", "R1R2"], ["RTN", "GPTQ"], ["NVFP4", "W8A8 static without down_proj", "long" * 40]
    found = []
    for number, (weights, rounding, form) in enumerate(itertools.product(*axes)):
        labels = {"weights": weights, "rounding": rounding, "format": form}
        one = result(0.001 * (1 + number % 5), 7_000_000 + number * 100_000, **labels)
        found.append(served(one, 50.0 + number, "failed" if number == 1 else "passed"))
    found[3] = result(0, why="out of memory " + "x" * 400, **found[3].point.labels)
    made = tmp_path_factory.mktemp("page") / "report.html"
    made.write_text(page.page("A sweep", measured.with_ratios(found), [one.point for one in found]), encoding="utf-8")
    return made


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_page_can_be_read_and_never_scrolls_sideways(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(STICKING_OUT) == []
    assert browser.evaluate(COLLISIONS) == []
    assert browser.evaluate(CONTRAST) == []
    assert browser.evaluate("document.querySelectorAll('svg.chart').length") == 4
    assert browser.requested == [file.as_uri()], "it asks for nothing but itself"
    assert browser.errors == []
