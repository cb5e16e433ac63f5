"""Vertical scales of curves: from zero, or logarithmic where values differ too much to be seen beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from builder.report.charts import nice_ticks

SPREAD = 30.0  # ratio of the largest to the smallest value from which a scale is logarithmic
FAR = 2.0  # a limit more than this many times above all values is not drawn: it would press them to the ground
FEW = 7  # ticks


@dataclass(frozen=True)
class Scale:
    """ticks: from the lowest to the highest. height: of a value, 0 at the lowest tick and 1 at the highest. limit:
    where to draw one, or None."""

    ticks: Sequence[float]
    height: Callable[[float], float]
    limit: float | None = None


def linear(values: Sequence[float], limit: float | None = None) -> Scale:
    """From zero."""
    shown = _near(values, limit)
    ticks = nice_ticks([0.0, *values, *([] if shown is None else [shown])])
    return Scale(ticks, lambda value: value / ticks[-1], shown)


def times(values: Sequence[float], limit: float | None = None) -> Scale:
    """For latencies, which grow without end once a server gets more requests than it can answer."""
    shown = _near(values, limit)
    known = [value for value in (*values, *([] if shown is None else [shown])) if value > 0]
    if not known or max(known) < SPREAD * min(known):
        return linear(values, limit)
    ticks = _decades(min(known), max(known))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    return Scale(ticks, lambda value: (math.log10(max(value, ticks[0])) - low) / (high - low), shown)


def _near(values: Sequence[float], limit: float | None) -> float | None:
    return limit if limit is not None and values and limit <= FAR * max(values) else None


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose both numbers, or only the powers if those are too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**n for n in range(first, last + 1) for factor in factors]
        start = max(n for n, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
        end = min(n for n, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
        ticks = ticks[start : end + 1]
        if len(ticks) <= FEW:
            break
    return ticks
