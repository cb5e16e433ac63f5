"""What `builder bench` sends: at which loads, how many requests of which lengths. Checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from builder.aiperf.objective import Objective
from builder.aiperf.trace import Trace
from builder.core.errors import UsageError

Api = Literal["chat", "completions"]
Arrival = Literal["poisson", "constant"]
REQUESTS = 32  # the default for each load


@dataclass(frozen=True)
class Load:
    """How requests are sent: closed loop at a concurrency, open loop at a rate per second, or at recorded times."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        """For tables and messages."""
        if self.concurrency is not None:
            return f"concurrency {self.concurrency}"
        return "recorded times" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Workload:
    """What is measured. `requests`: of each load. A trace has the lengths of its own."""

    loads: tuple[Load, ...]
    requests: int = REQUESTS
    input_tokens: int = 128
    output_tokens: int = 32
    trace: Trace | None = None
    objective: Objective | None = None
    arrival: Arrival = "poisson"
    api: Api = "chat"
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of a trace only its digest."""
        return {
            "requests": self.requests,
            "input_tokens": None if self.trace else self.input_tokens,
            "output_tokens": None if self.trace else self.output_tokens,
            "trace": self.trace.digest if self.trace else None,
            "objective": [list(limit) for limit in self.objective.limits] if self.objective else None,
            "arrival": self.arrival,
            "api": self.api,
            "seed": self.seed,
        }


def default_requests(loads: tuple[Load, ...], trace: Trace | None) -> int:
    """All requests of a trace; else 32, or two per request in flight at the highest concurrency."""
    if trace:
        return len(trace.requests)
    return max(REQUESTS, *(2 * (load.concurrency or 0) for load in loads))


def check(workload: Workload, facts: Mapping[str, Any]) -> None:
    """UsageError if a value makes no sense or the repository, whose limits are in `facts`, would refuse a request."""
    for load in workload.loads:
        if load.concurrency is not None and load.concurrency < 1:
            raise UsageError(f"--concurrency must be at least 1 (got {load.concurrency}).", hint="--concurrency 1")
        if load.rate is not None and not 0 < load.rate <= 100_000:
            raise UsageError(f"--rate must be above 0 and at most 100000 (got {load.rate:g}).", hint="--rate 2.5")
    _check_requests(workload)
    if not facts["decoupled"]:
        raise UsageError(
            "The repository does not stream, so there is no time to a first token to measure.",
            hint="builder load REPOSITORY measures it without, or build it with --set repository.decoupled=true",
        )
    if workload.trace:
        for number, one in enumerate(workload.trace.requests[: workload.requests], 1):
            _check_lengths(one.input_tokens, one.output_tokens, facts, f"Request {number} of the trace")
        return
    for name, value in (("input-tokens", workload.input_tokens), ("output-tokens", workload.output_tokens)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1 (got {value}).", hint=f"--{name} 32")
    _check_lengths(workload.input_tokens, workload.output_tokens, facts, "Each request")


def _check_requests(workload: Workload) -> None:
    if workload.requests < 1:
        raise UsageError(f"--requests must be at least 1 (got {workload.requests}).", hint=f"--requests {REQUESTS}")
    highest = max((load.concurrency or 0 for load in workload.loads), default=0)
    if highest > workload.requests:
        raise UsageError(
            f"{workload.requests} requests are too few for a concurrency of {highest}.",
            why="There would never be that many requests in flight.",
            hint=f"--requests {2 * highest}",
        )
    if workload.trace and workload.requests > len(workload.trace.requests):
        raise UsageError(
            f"The trace has {len(workload.trace.requests)} requests, not {workload.requests}.",
            hint=f"--requests {len(workload.trace.requests)}",
        )
    if workload.trace and not workload.trace.timed and any(load == Load() for load in workload.loads):
        raise UsageError(
            "The trace has requests without a timestamp, so their times can't be replayed.",
            hint="Say how to send them: --concurrency 8 or --rate 2.5",
        )


def _check_lengths(input_tokens: int, output_tokens: int, facts: Mapping[str, Any], what: str) -> None:
    longest, total = int(facts["max_input_len"]), int(facts["max_seq_len"])
    if input_tokens > longest or input_tokens + output_tokens > total:
        raise UsageError(
            f"{what} has {input_tokens} input and {output_tokens} output tokens, more than the repository takes.",
            why=f"It accepts up to {longest} input tokens (max_input_len) and {total} tokens in total (max_seq_len).",
            hint="Shorten it: --input-tokens, --output-tokens, or the lengths in the trace",
        )
