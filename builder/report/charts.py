"""Draws charts as inline SVG. Pure functions from numbers and labels to markup.

Horizontal positions are percentages of the width and text has a fixed size, so a chart is as legible at 360 px as at
1280 px. Colours are CSS variables of the page, so one drawing serves the light and the dark theme.

In all charts, `name` is the prefix of element ids, unique on the page; `title` and `description` are for screen
readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

ROW = 42  # px: a row, with its label above the mark
TOP = 4  # px: space above the first row
AXIS = 26  # px: the axis below the last row
LABEL = 32  # characters of a label before it is cut; the mark's <title> has all of it


@dataclass(frozen=True)
class Mark:
    """One row or column: its value, and `text`, the value as shown.

    `low`, `high`: its confidence interval, if it has one. `tone`: a CSS class. `tick`: a short label below a column.
    """

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    tone: str = ""
    tick: str = ""


def bars(name: str, title: str, description: str, marks: Sequence[Mark]) -> str:
    """A horizontal bar chart from zero, with error bars for marks that have an interval."""
    largest = max((mark.high or mark.value for mark in marks), default=0.0) or 1.0
    body = []
    for row, mark in enumerate(marks):
        y = TOP + row * ROW
        width = max(100 * mark.value / largest, 0.3)  # so that even a tiny value is visible
        body += [
            f'<g class="row {escape(mark.tone)}">',
            _text(mark, y),
            f'<rect class="track" x="0" y="{y + 22}" width="100%" height="10" rx="5"/>',
            f'<rect class="bar" x="0" y="{y + 22}" width="{width:.2f}%" height="10" rx="5"/>',
            _error_bar(mark, y + 27, lambda value: 100 * value / largest),
            "</g>",
        ]
    return svg(name, title, description, TOP + len(marks) * ROW, body)


def dots(
    name: str, title: str, description: str, marks: Sequence[Mark], lines: Sequence[tuple[float, str, str]] = ()
) -> str:
    """A dot plot with confidence intervals, on an axis that fits the values and need not include zero.

    `lines`: vertical reference lines as (value, label, tone), such as BF16 = 100.
    """
    values = [v for mark in marks for v in (mark.value, mark.low, mark.high) if v is not None]
    ticks = nice_ticks([*values, *(value for value, _, _ in lines)])
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return 2 + 83 * (value - low) / (high - low)  # leaves room for half a dot on the left, values on the right

    top = 22 if lines else 0
    bottom = top + TOP + len(marks) * ROW
    body = [f'<line class="axis" x1="2%" x2="85%" y1="{bottom}" y2="{bottom}"/>']
    for tick in ticks:
        body.append(f'<line class="grid" x1="{place(tick):.2f}%" x2="{place(tick):.2f}%" y1="{top}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{place(tick):.2f}%" y="{bottom + 18}">{tick:g}</text>')
    for value, label, tone in lines:
        x, anchor = place(value), "end" if place(value) > 50 else "start"
        body.append(f'<line class="line {escape(tone)}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top}" y2="{bottom}"/>')
        body.append(f'<text class="tick {escape(tone)}" x="{x:.2f}%" y="14" style="text-anchor:{anchor}">')
        body.append(f"{escape(label)}</text>")
    for row, mark in enumerate(marks):
        y = top + TOP + row * ROW
        body += [
            f'<g class="row {escape(mark.tone)}">',
            _text(mark, y),
            _error_bar(mark, y + 28, place),
            f'<circle class="dot" cx="{place(mark.value):.2f}%" cy="{y + 28}" r="5"/>',
            "</g>",
        ]
    return svg(name, title, description, bottom + AXIS, body)


def columns(name: str, title: str, description: str, marks: Sequence[Mark], height: int = 160) -> str:
    """A column chart from zero for many marks, in the given order. Only the highest value is written.

    `height`: of the highest column, in px. Of adjacent marks with the same tick (the parts of a layer) the first is
    labelled; if that makes more than eight labels, every second, third, ... of those.
    """
    largest = max((mark.value for mark in marks), default=0.0) or 1.0
    step = 100 / max(len(marks), 1)
    firsts = [index for index, mark in enumerate(marks) if index == 0 or mark.tick != marks[index - 1].tick]
    labelled = set(firsts[:: max(1, math.ceil(len(firsts) / 8))])
    body = (
        [f'<text class="label" x="0" y="14">{escape(max(marks, key=lambda m: m.value).text)}</text>'] if marks else []
    )
    body.append('<line class="grid" x1="0" x2="100%" y1="22" y2="22"/>')
    for index, mark in enumerate(marks):
        tall = max(height * mark.value / largest, 1.0)
        body += [
            f'<g class="row {escape(mark.tone)}"><title>{escape(f"{mark.label}: {mark.text}")}</title>',
            f'<rect class="bar" x="{(index + 0.12) * step:.3f}%" y="{22 + height - tall:.1f}" '
            f'width="{0.76 * step:.3f}%" height="{tall:.1f}"/></g>',
        ]
        if index in labelled:
            body.append(f'<text class="tick" x="{(index + 0.5) * step:.2f}%" y="{height + 40}">')
            body.append(f"{escape(_cut(mark.tick, 12))}</text>")
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{22 + height}" y2="{22 + height}"/>')
    return svg(name, title, description, height + 22 + AXIS, body)


def nice_ticks(values: Sequence[float], most: int = 6) -> list[float]:
    """Evenly spaced round numbers, at most `most`, that enclose all values (at least one)."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - max(abs(low) * 0.01, 1e-6), high + max(abs(high) * 0.01, 1e-6)
    step = 10 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        first, last = math.floor(low / (step * factor) + 1e-9), math.ceil(high / (step * factor) - 1e-9)
        if last - first < most:
            break
    return [round(n * step * factor, 12) for n in range(first, last + 1)]


def _text(mark: Mark, y: int) -> str:
    """The label on the left, the value on the right, and both as a <title> for screen readers and tooltips."""
    return (
        f"<title>{escape(f'{mark.label}: {mark.text}')}</title>"
        f'<text class="label" x="0" y="{y + 15}">{escape(_cut(mark.label, LABEL))}</text>'
        f'<text class="value" x="100%" y="{y + 15}">{escape(mark.text)}</text>'
    )


def _error_bar(mark: Mark, y: int, place: Callable[[float], float]) -> str:
    """The confidence interval at height `y`; `place` maps a value to per cent of the width."""
    if mark.low is None or mark.high is None:
        return ""
    low, high = max(place(mark.low), 0.0), place(mark.high)
    ends = "".join(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{y - 5}" y2="{y + 5}"/>' for x in (low, high))
    return f'<g class="interval"><line x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>{ends}</g>'


def svg(name: str, title: str, description: str, height: int, body: Sequence[str]) -> str:
    """A chart of this height with what is drawn in it."""
    return (
        f'<svg class="chart" role="img" width="100%" height="{height}" '
        f'aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>{"".join(body)}</svg>'
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
