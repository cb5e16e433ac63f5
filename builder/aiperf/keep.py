"""Keeps a measurement beside its repository, for `builder report`, and shows it as a table."""

from __future__ import annotations

from pathlib import Path

from builder.aiperf.measured import STAGE, Measurement, Point
from builder.core.output import Output
from builder.serving import benchmark
from builder.serving.benchmark import format_percentiles
from builder.triton.repository import Repository


def save(repository: Repository, measurement: Measurement, out: Output) -> Path | None:
    """Keeps the measurement beside the repository (serving.benchmark.keep)."""
    return benchmark.keep(repository, STAGE, measurement.as_dict(), out)


def show(measurement: Measurement, out: Output) -> None:
    """Prints the points as a table, and warns about failed requests."""
    columns = ["load", "completed", "requests/s", "tokens/s", "TTFT", "inter-token latency", "request latency"]
    objective = measurement.objective
    rows = [_row(point) + (_good(point) if objective else ()) for point in measurement.points]
    title = f"AIPerf {measurement.version}: {lengths(measurement)} (p50 / p90 / p99)"
    out.table(title, [*columns, *(["goodput/s", "good"] if objective else [])], rows)
    for point in measurement.points:
        if point.failed:
            out.warn(f"{point.failed} requests failed at {point.load.label}. The first error: {point.error}")
    if objective:
        out.text(f"objective  {objective}")
        best = measurement.best
        met = f"{best.load.label}: {best.goodput:.2f} good requests/s" if best else "no request met the objective"
        out.text(f"best       {met}")


def lengths(measurement: Measurement) -> str:
    """How long the requests were: `128 input and 32 output tokens`."""
    workload = measurement.workload
    if workload["trace"]:
        return f"recorded lengths, {workload['requests']} requests"
    return f"{workload['input_tokens']} input and {workload['output_tokens']} output tokens"


def _row(point: Point) -> tuple[str, ...]:
    return (
        point.load.label,
        f"{point.completed}" + (f", {point.failed} FAILED" if point.failed else ""),
        f"{point.requests_per_second:.2f}",
        f"{point.tokens_per_second:.1f}",
        *(format_percentiles(times) for times in (point.ttft, point.inter_token_latency, point.latency)),
    )


def _good(point: Point) -> tuple[str, ...]:
    return (f"{point.goodput or 0.0:.2f}", "–" if point.good is None else f"{100 * point.good:.0f} %")
