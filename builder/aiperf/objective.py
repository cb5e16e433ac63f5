"""What a request must keep to for its answer to be of use: `ttft<=500ms,itl<=50ms`.

Requests that keep to every limit are good; their number per second is the goodput (DistServe, arXiv 2401.09670).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from builder.core.errors import UsageError

# Name -> AIPerf's name, a metric of each request in milliseconds (aiperf 0.13.0, --goodput).
METRICS = {"ttft": "time_to_first_token", "itl": "inter_token_latency", "latency": "request_latency"}
MILLISECONDS = {"ms": 1.0, "s": 1000.0}
EXAMPLE = '--objective "ttft<=500ms,itl<=50ms"'
_LIMIT = re.compile(r"([a-z]+)\s*<=?\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)")


@dataclass(frozen=True)
class Objective:
    """Limits of one request: (name of METRICS, milliseconds), in that order."""

    limits: tuple[tuple[str, float], ...]

    @property
    def goodput(self) -> str:
        """The limits as AIPerf's --goodput takes them."""
        return " ".join(f"{METRICS[name]}:{limit:g}" for name, limit in self.limits)

    @property
    def spoken(self) -> str:
        """For reports: `ttft ≤ 500 ms, itl ≤ 50 ms`."""
        return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in self.limits)

    def __str__(self) -> str:
        return ",".join(f"{name}<={limit:g}ms" for name, limit in self.limits)


def parse(text: str) -> Objective:
    """The objective that was typed. UsageError for an unknown metric or unit, or a limit that is not above 0."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = _LIMIT.fullmatch(part.strip().lower())
        if not found or found[3] not in MILLISECONDS:
            raise UsageError(
                f"{part.strip()!r} is not a limit.", why="A limit has a metric, <= and a time in ms or s.", hint=EXAMPLE
            )
        name, limit = found[1], float(found[2]) * MILLISECONDS[found[3]]
        if name not in METRICS:
            raise UsageError(
                f"{name!r} is not a metric of --objective.",
                why="ttft is the time to the first token, itl the mean time between tokens of an answer, and latency "
                "the time to its end.",
                hint=EXAMPLE,
            )
        if name in limits:
            raise UsageError(f"--objective has two limits of {name}.", hint=EXAMPLE)
        if not 0 < limit < math.inf:
            raise UsageError(f"The limit of {name} must be above 0 (got {part.strip()}).", hint=EXAMPLE)
        limits[name] = limit
    return Objective(tuple((name, limits[name]) for name in METRICS if name in limits))


def from_list(stored: Sequence[Sequence[str | float]] | None) -> Objective | None:
    """The objective as JSON holds it, a list of limits."""
    return Objective(tuple((str(name), float(limit)) for name, limit in stored)) if stored else None
