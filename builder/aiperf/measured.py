"""What AIPerf measured at each load, read from its JSON export (profile_export_aiperf.json of aiperf 0.13.0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from builder.aiperf.objective import Objective, from_list
from builder.aiperf.workload import Load
from builder.serving.benchmark import Percentiles

STAGE = "aiperf"
TIMES = {"ttft": "time_to_first_token", "inter_token_latency": "inter_token_latency", "latency": "request_latency"}


@dataclass(frozen=True)
class Point:
    """Results at one load. Rates are of all requests together; times are percentiles over requests, in seconds.

    `input_tokens`, `output_tokens`: means of a request, as the server counts them. `goodput`: good requests per second,
    `good`: their share; None without an objective. `error`: the first error, if a request failed.
    """

    load: Load
    completed: int
    failed: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    input_tokens: float
    output_tokens: float
    ttft: Percentiles | None
    inter_token_latency: Percentiles | None
    latency: Percentiles | None
    goodput: float | None = None
    good: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Measurement:
    """The workload as JSON holds it, the points in the order in which they were measured, and AIPerf's version."""

    workload: Mapping[str, Any]
    points: tuple[Point, ...]
    version: str

    @property
    def objective(self) -> Objective | None:
        """What a good request keeps to."""
        return from_list(self.workload.get("objective"))

    @property
    def best(self) -> Point | None:
        """The point with the highest goodput; None without an objective, or if no request was good."""
        rated = [point for point in self.points if point.goodput]
        return max(rated, key=lambda point: point.goodput or 0.0, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "points": [asdict(point) for point in self.points]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `as_dict`, also after a round trip through JSON."""
        return cls(data["workload"], tuple(_stored(point) for point in data["points"]), data["version"])


def point(load: Load, export: Mapping[str, Any]) -> Point:
    """Reads an export. Metrics that AIPerf left out, because no request completed, are 0 or None."""
    total, failed = int(_average(export, "completed_request_count")), _failed(export)
    errors = export.get("error_summary") or []
    share = _average(export, "good_request_fraction") if "good_request_fraction" in export else None
    return Point(
        load=load,
        completed=total - failed,
        failed=failed,
        seconds=_average(export, "benchmark_duration"),
        requests_per_second=_average(export, "request_throughput"),
        tokens_per_second=_average(export, "output_token_throughput"),
        input_tokens=_average(export, "input_sequence_length"),
        output_tokens=_average(export, "output_sequence_length"),
        **{name: _percentiles(export.get(tag)) for name, tag in TIMES.items()},
        goodput=_average(export, "goodput") if "goodput" in export else None,
        good=share,
        error=_first(errors),
    )


def _average(export: Mapping[str, Any], name: str) -> float:
    return round(float((export.get(name) or {}).get("avg") or 0.0), 6)


def _failed(export: Mapping[str, Any]) -> int:
    return sum(int(error.get("count", 0)) for error in export.get("error_summary") or [])


def _percentiles(found: Mapping[str, Any] | None) -> Percentiles | None:
    """AIPerf has milliseconds."""
    if not found or found.get("p50") is None:
        return None
    return Percentiles(*(round(float(found[name]) / 1000, 6) for name in ("p50", "p90", "p99")))


def _first(errors: Sequence[Mapping[str, Any]]) -> str:
    for error in errors:
        details = error.get("error_details") or {}
        return " ".join(str(details.get("message") or details or error).split())[:400]
    return ""


def _stored(data: Mapping[str, Any]) -> Point:
    times = {name: Percentiles(**data[name]) if data[name] else None for name in TIMES}
    return Point(**{**data, **times, "load": Load(**data["load"])})
