"""Draws curves as inline SVG: a figure as the load grows. Horizontal places are per cent, as in charts.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from builder.report import scales
from builder.report.charts import AXIS, svg
from builder.report.scales import Scale

TOP = 34  # px: the legend, above the highest grid line
HEIGHT = 170  # px: from the highest grid line to the axis
LEFT, RIGHT = 12.0, 96.0  # per cent: of the first and the last point; the numbers of the axis are left of it
MIDDLE = 56.0  # per cent: of the limit in the legend
TICKS = 12  # most labels on the x axis
TONES = ("first", "second")  # CSS classes, so at most two curves


@dataclass(frozen=True)
class Curve:
    """One figure at each load; None where it was not measured. `texts`: the values as shown."""

    name: str
    values: Sequence[float | None]
    texts: Sequence[str]


def known(drawn: Sequence[Curve]) -> list[float]:
    """All values that were measured."""
    return [value for curve in drawn for value in curve.values if value is not None]


def curves(
    name: str,
    title: str,
    description: str,
    ticks: Sequence[str],
    drawn: Sequence[Curve],
    scale: Scale | None = None,
) -> str:
    """One or two curves over evenly spaced loads, with a label below each. scale: from zero by default."""
    scale = scale or scales.linear(known(drawn))
    across = _across(len(ticks))

    def up(value: float) -> float:
        return TOP + HEIGHT * (1 - scale.height(value))

    body = []
    for number, tick in enumerate(scale.ticks):
        kind = "grid" if number else "axis"
        body.append(f'<line class="{kind}" x1="0" x2="100%" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        body.append(f'<text class="scale" x="0" y="{up(tick) - 4:.1f}">{tick:g}</text>')
    if scale.limit is not None:
        at, said = f"{up(scale.limit):.1f}", escape(f"limit {scale.limit:g}")
        body.append(f'<g class="curve limit"><line class="path" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        body.append(f'<text class="legend" x="{MIDDLE}%" y="14" style="text-anchor:middle">┄ {said}</text></g>')
    step = -(-len(ticks) // TICKS)
    for index in range(0, len(ticks), step):
        body.append(
            f'<text class="tick" x="{across(index):.2f}%" y="{TOP + HEIGHT + 18}">{escape(ticks[index])}</text>'
        )
    for number, (curve, tone) in enumerate(zip(drawn, TONES, strict=False)):
        x, anchor = (LEFT, "start") if number == 0 else (100.0, "end")
        body.append(f'<g class="curve {tone}"><text class="legend" x="{x}%" y="14" style="text-anchor:{anchor}">')
        body += [f"● {escape(curve.name)}</text>", *_curve(curve, ticks, across, up), "</g>"]
    return svg(name, title, description, TOP + HEIGHT + AXIS, body)


def _across(count: int) -> Callable[[int], float]:
    """The horizontal place of each point in per cent; of a single one the middle."""
    return lambda index: (LEFT + RIGHT) / 2 if count == 1 else LEFT + (RIGHT - LEFT) * index / (count - 1)


def _curve(
    curve: Curve, ticks: Sequence[str], across: Callable[[int], float], up: Callable[[float], float]
) -> list[str]:
    """Dots with their values as tooltips, and lines between neighbours; a polyline could not be placed in per cent."""
    measured = [(index, value) for index, value in enumerate(curve.values) if value is not None]
    drawn = [
        f'<line class="path" x1="{across(i):.2f}%" y1="{up(a):.1f}" x2="{across(j):.2f}%" y2="{up(b):.1f}"/>'
        for (i, a), (j, b) in pairwise(measured)
    ]
    for index, value in measured:
        said = escape(f"{ticks[index]}: {curve.name} {curve.texts[index]}")
        drawn.append(f'<circle class="point" cx="{across(index):.2f}%" cy="{up(value):.1f}" r="4">')
        drawn.append(f"<title>{said}</title></circle>")
    return drawn
