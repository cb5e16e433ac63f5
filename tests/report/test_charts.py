"""Charts are well-formed, to scale, described for screen readers, and never wider than the page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.report import charts, scales
from builder.report.charts import Mark
from builder.report.curves import Curve, curves

MARKS = [Mark("embedding", 50.0, "50 B"), Mark("weights", 100.0, "100 B", 90.0, 125.0), Mark("nothing", 0.0, "0 B")]
HOSTILE = '</svg><script>alert("x")</script>&'
numbers = st.floats(min_value=-1e9, max_value=1e9)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def percents(svg: str) -> list[float]:
    return [float(n) for n in re.findall(r' (?:x|x1|x2|cx|width)="([-\d.]+)%"', svg)]


def drawn() -> dict[str, str]:
    return {
        "bars": charts.bars("a", "Sizes", "in bytes", MARKS),
        "dots": charts.dots("b", "Scores", "of 100", MARKS, [(100.0, "BF16 = 100", "base"), (98.0, "gate 98", "gate")]),
        "columns": charts.columns(
            "c", "Loss", "by layer", [Mark(f"layer {n}", n / 7, f"{n}", tick=f"{n}") for n in range(64)]
        ),
    }


@pytest.mark.parametrize("count", [1, 2, 30])
def test_curves_begin_at_zero_stay_inside_and_leave_out_what_was_not_measured(count: int) -> None:
    values: list[float | None] = [None if n == 3 else 10.0 * n for n in range(count)]
    texts = [f"{HOSTILE}{n}" for n in range(count)]
    second = Curve("p99", [5.0] * count, texts)
    svg = curves("d", "TTFT", HOSTILE, [f"{n}{HOSTILE}" for n in range(count)], [Curve("p50", values, texts), second])
    root = parse(svg)
    assert all(0 <= place <= 100 for place in percents(svg))
    dots = [dot for dot in root.iter("circle") if dot.get("class") == "point"]
    assert len(dots) == 2 * count - (count > 3)
    heights = [float(dot.get("cy", "-1")) for dot in dots]
    assert all(0 < height <= float(root.get("height", "0")) for height in heights)
    assert heights[0] == max(heights), "0 is on the axis"
    assert not list(root.iter("script"))


@given(st.lists(st.floats(0.01, 1e7), min_size=1, max_size=8), st.none() | st.floats(0.01, 1e8))
def test_a_scale_of_times_holds_all_values_and_the_limit(values: list[float], limit: float | None) -> None:
    scale = scales.times(values, limit)
    shown = [*values, *([] if scale.limit is None else [scale.limit])]
    assert all(-1e-9 <= scale.height(value) <= 1 + 1e-9 for value in shown)
    assert scale.ticks[0] <= min(shown) * (1 + 1e-6)
    assert max(shown) <= scale.ticks[-1] * (1 + 1e-6)
    assert list(scale.ticks) == sorted(scale.ticks)
    assert len(scale.ticks) <= 12
    ordered = sorted(shown)
    assert [scale.height(value) for value in ordered] == sorted(scale.height(value) for value in ordered)


def test_a_scale_is_logarithmic_only_where_values_could_not_be_seen() -> None:
    """Two seconds beside sixty; the objective is drawn unless it is far above all that was measured."""
    assert scales.times([10.0, 100.0], 50.0).ticks[0] == 0
    found = scales.times([90.0, 200.0, 55_000.0], 500.0)
    assert list(found.ticks) == [10.0, 100.0, 1000.0, 10_000.0, 100_000.0]
    assert found.limit == 500.0
    assert scales.times([10.0, 20.0], 500.0).limit is None
    svg = curves("d", "TTFT", "t", ["1", "2", "3"], [Curve("p50", [90.0, 200.0, 55_000.0], ["a", "b", "c"])], found)
    [limit] = [group for group in parse(svg).iter("g") if group.get("class") == "curve limit"]
    assert "limit 500" in "".join(limit.itertext())


@pytest.mark.parametrize("kind", ["bars", "dots", "columns"])
def test_a_chart_is_well_formed_says_what_it_shows_and_stays_inside(kind: str) -> None:
    svg = drawn()[kind]
    root = parse(svg)
    assert root.attrib["role"] == "img"
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    assert set(root.attrib["aria-labelledby"].split()) <= ids
    assert [root.findtext("title"), root.findtext("desc")] != [None, None]
    assert percents(svg)
    assert all(-0.01 <= n <= 100.01 for n in percents(svg))
    assert not re.search(r"#[0-9a-f]{3}|rgb\(|style=\"fill", svg), "colours are the page's"


def test_bars_are_in_proportion_with_the_interval_at_its_place() -> None:
    root = parse(drawn()["bars"])
    widths = [float(r.attrib["width"].rstrip("%")) for r in root.iter("rect") if r.attrib["class"] == "bar"]
    assert widths == [pytest.approx(40), pytest.approx(80), pytest.approx(0.3)]  # of the largest, 125
    [interval] = [g for g in root.iter("g") if g.attrib.get("class") == "interval"]
    assert [interval[0].attrib[x] for x in ("x1", "x2")] == ["72.00%", "100.00%"]


def test_dots_show_small_differences_and_the_lines_to_compare_with() -> None:
    marks = [Mark("wikitext", 98.5, "98.5", 98.2, 98.9), Mark("prose", 99.1, "99.1", 98.8, 99.4)]
    root = parse(charts.dots("a", "t", "d", marks, [(100.0, "BF16 = 100", "base")]))
    first, second = (float(dot.attrib["cx"].rstrip("%")) for dot in root.iter("circle"))
    assert second - first > 15
    [base] = [line for line in root.iter("line") if line.get("class") == "line base"]
    assert float(base.attrib["x1"].rstrip("%")) > second


@pytest.mark.parametrize("chart", [charts.bars, charts.dots, charts.columns])
def test_hostile_labels_are_text(chart: object) -> None:
    svg = chart("a", HOSTILE, HOSTILE, [Mark(HOSTILE, 1.0, HOSTILE, tone='"><script>')])  # type: ignore[operator]
    assert {element.tag for element in parse(svg).iter()} <= {
        "svg", "g", "title", "desc", "text", "rect", "line", "circle",
    }  # fmt: skip
    assert "<script" not in svg


def test_a_long_label_is_cut_where_it_is_drawn_and_whole_where_it_is_told() -> None:
    name = "a-very-long-data-set-name-" * 4
    root = parse(charts.bars("a", "t", "d", [Mark(name, 1.0, "1")]))
    texts = [element.text or "" for element in root.iter("text")]
    assert all(len(text) <= charts.LABEL for text in texts)
    assert f"{name}: 1" in [element.text for element in root.iter("title")]


def test_the_parts_of_a_layer_share_one_label_and_few_are_drawn() -> None:
    def labels(layers: int) -> list[str | None]:
        marks = [Mark(f"layer {n // 4}", 1.0, "1", tick=f"{n // 4}") for n in range(4 * layers)]
        root = parse(charts.columns("a", "t", "d", marks))
        return [text.text for text in root.iter("text") if text.attrib["class"] == "tick"]

    assert labels(6) == ["0", "1", "2", "3", "4", "5"]
    assert labels(36) == ["0", "5", "10", "15", "20", "25", "30", "35"]


def test_no_marks_and_only_zeros_are_drawn_too() -> None:
    for chart in (charts.bars, charts.columns):
        parse(chart("a", "t", "d", []))
        parse(chart("a", "t", "d", [Mark("x", 0.0, "0")]))


@given(st.lists(numbers, min_size=1, max_size=8))
def test_ticks_enclose_every_value_and_are_few(values: list[float]) -> None:
    ticks = charts.nice_ticks(values)
    assert 2 <= len(ticks) <= 7
    spread = max(max(values) - min(values), 1e-6, abs(max(values)) * 0.02)
    assert ticks[0] <= min(values) + 1e-6 * spread + 1e-9
    assert ticks[-1] >= max(values) - 1e-6 * spread - 1e-9
    assert ticks == sorted(set(ticks))
