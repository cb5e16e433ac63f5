"""The curves of a measurement under load: what AIPerf found at each concurrency or rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from builder.aiperf.measured import Measurement, Point
from builder.aiperf.objective import METRICS, Objective
from builder.report import scales
from builder.report.curves import Curve, curves, known
from builder.serving.benchmark import Percentiles


@dataclass(frozen=True)
class LoadChart:
    """A chart and the sentence below it."""

    chart: Markup
    caption: str


def charts(measurement: Measurement | None) -> list[LoadChart]:
    """Throughput, TTFT and inter-token latency over concurrency, and over rates; nothing over a single load."""
    if measurement is None:
        return []
    closed = [point for point in measurement.points if point.load.concurrency is not None]
    opened = [point for point in measurement.points if point.load.rate is not None]
    found = []
    for points, slug, axis in ((closed, "closed", "requests in flight"), (opened, "open", "requests sent per second")):
        if len(points) > 1:
            ordered = sorted(points, key=lambda point: point.load.concurrency or point.load.rate or 0)
            found += _charts(ordered, slug, axis, measurement.objective)
    return found


def best(measurement: Measurement | None) -> str:
    """A sentence on the load with the highest goodput; "" without an objective."""
    if measurement is None or measurement.objective is None:
        return ""
    point = measurement.best
    if point is None:
        return "No request met the objective."
    return f"Most good requests: {point.goodput:.2f} per second, at {point.load.label}."


def _charts(points: Sequence[Point], slug: str, axis: str, objective: Objective | None) -> list[LoadChart]:
    ticks = [f"{point.load.concurrency or point.load.rate:g}" for point in points]
    limits = dict(objective.limits) if objective else {}

    def made(name: str, title: str, drawn: Sequence[Curve]) -> LoadChart:
        said = "; ".join(
            f"at {tick}: " + ", ".join(f"{curve.name} {curve.texts[n]}" for curve in drawn)
            for n, tick in enumerate(ticks)
        )
        measured, in_time = known(drawn), name in METRICS
        scale = scales.times(measured, limits.get(name)) if in_time else scales.linear(measured)
        caption = f"{title}, by the number of {axis}" + ", on a logarithmic scale" * bool(scale.ticks[0]) + "."
        drawing = curves(f"load-{slug}-{name}", title, f"{caption} {said}.", ticks, drawn, scale)
        return LoadChart(Markup(drawing), caption)

    rates = [_curve("tokens/s", points, lambda point: point.tokens_per_second)]
    requests = [_curve("requests/s", points, lambda point: point.requests_per_second)]
    requests += [_curve("good requests/s", points, lambda point: point.goodput)] if objective else []
    return [
        made("tokens", "Output tokens per second", rates),
        made("requests", "Requests per second", requests),
        made("ttft", "Time to first token in ms", _times(points, lambda point: point.ttft)),
        made("itl", "Inter-token latency in ms", _times(points, lambda point: point.inter_token_latency)),
    ]


def _times(points: Sequence[Point], of: Callable[[Point], Percentiles | None]) -> list[Curve]:
    """p50 and p99 in milliseconds."""

    def percentile(point: Point, name: str) -> float | None:
        times = of(point)
        return None if times is None else 1000 * float(getattr(times, name))

    return [
        _curve("p50", points, lambda point: percentile(point, "p50")),
        _curve("p99", points, lambda point: percentile(point, "p99")),
    ]


def _curve(name: str, points: Sequence[Point], of: Callable[[Point], float | None]) -> Curve:
    values = [of(point) for point in points]
    return Curve(name, values, ["–" if value is None else f"{value:,.4g}" for value in values])
