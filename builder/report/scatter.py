"""A scatter plot as inline SVG, in the manner of charts.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from builder.report.charts import AXIS, TOP, nice_ticks, svg


@dataclass(frozen=True)
class Spot:
    """One of a scatter plot. tone: a CSS class; spots with the tone "front" are joined by a line, in their order, and
    those with the tone "other" lie below all others."""

    label: str
    x: float
    y: float
    text: str
    tone: str = ""


def scatter(name: str, title: str, description: str, spots: Sequence[Spot], height: int = 260) -> str:
    """A scatter plot, on axes that fit the values and need not include zero. Tooltips name every spot."""
    across, up = nice_ticks([spot.x for spot in spots]), nice_ticks([spot.y for spot in spots])

    def x(value: float) -> float:
        return 10 + 86 * (value - across[0]) / (across[-1] - across[0])

    def y(value: float) -> float:
        return TOP + height - height * (value - up[0]) / (up[-1] - up[0])

    bottom = TOP + height
    body = [f'<line class="axis" x1="10%" x2="96%" y1="{bottom}" y2="{bottom}"/>']
    for tick in across:
        body.append(f'<line class="grid" x1="{x(tick):.2f}%" x2="{x(tick):.2f}%" y1="{TOP}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{x(tick):.2f}%" y="{bottom + 18}">{tick:g}</text>')
    for tick in up:
        body.append(f'<line class="grid" x1="10%" x2="96%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text class="tick" x="9%" y="{y(tick) + 4:.1f}" style="text-anchor:end">{tick:g}</text>')
    front = [spot for spot in spots if spot.tone == "front"]
    for one, other in itertools.pairwise(front):
        ends = f'x1="{x(one.x):.2f}%" y1="{y(one.y):.1f}" x2="{x(other.x):.2f}%" y2="{y(other.y):.1f}"'
        body.append(f'<line class="line" {ends}/>')
    for spot in sorted(spots, key=lambda spot: spot.tone != "other"):
        at = f'cx="{x(spot.x):.2f}%" cy="{y(spot.y):.1f}"'
        body.append(f'<g class="{escape(spot.tone)}"><title>{escape(f"{spot.label}: {spot.text}")}</title>')
        body.append(f'<circle class="dot" {at} r="5"/></g>')
    return svg(name, title, description, bottom + AXIS, body)
