"""What is known of a request when it ends: for the metrics, and for the log. Neither contains prompts or answers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


@dataclass
class Record:
    """One request. Times are of time.monotonic. `status` is 499 if the client left before its response was complete,
    or stalled: it read nothing for too long."""

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    streamed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    code: str = ""
    detail: str = ""
    model: str = ""
    body: int = 0  # bytes
    stalled: bool = False
    releases: list[Callable[[], None]] = field(default_factory=list)  # called when the request has ended

    @property
    def failed(self) -> bool:
        """Whether the fault is the server's: a status of 500 or more, or an error within a stream."""
        return self.status >= 500 or (self.status == 200 and bool(self.code))

    def token(self) -> None:
        """Notes the time of the first piece of text."""
        if self.first_token is None:
            self.first_token = time.monotonic()


class Metrics:
    """Prometheus metrics of the gateway."""

    def __init__(self, in_progress: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "gateway_requests", "Requests by path and HTTP status", ["path", "status"], registry=self.registry
        )
        self._prompt = Counter("gateway_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self._completion = Counter("gateway_completion_tokens", "Tokens of answers", registry=self.registry)
        self._cancelled = Counter(
            "gateway_cancelled", "Requests whose client left or did not read", registry=self.registry
        )
        self.stalled = Counter(
            "gateway_stalled", "Connections that were closed because the client read nothing", registry=self.registry
        )
        self._seconds = Histogram(
            "gateway_request_seconds", "Time of a generation request", ["path"], buckets=SECONDS, registry=self.registry
        )
        self._first = Histogram(
            "gateway_first_token_seconds", "Time to first token", buckets=SECONDS, registry=self.registry
        )
        self._token = Histogram(
            "gateway_inter_token_seconds", "Mean time between two tokens of a request",
            buckets=TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        Gauge("gateway_answers_in_progress", "Answers in progress", registry=self.registry).set_function(in_progress)

    def add(self, record: Record, path: str) -> None:
        """Counts a request that has ended. `path`: of its route; others would make a label for whatever is sent."""
        self._requests.labels(path, str(record.status)).inc()
        self._prompt.inc(record.prompt_tokens)
        self._completion.inc(record.completion_tokens)
        if record.status == 499:
            self._cancelled.inc()
        if not record.prompt_tokens:
            return
        now = time.monotonic()
        self._seconds.labels(path).observe(now - record.started)
        if record.first_token is not None:
            self._first.observe(record.first_token - record.started)
            if record.completion_tokens > 1 and record.streamed:
                self._token.observe((now - record.first_token) / (record.completion_tokens - 1))


def log(level: str, event: str, **values: Any) -> None:
    """Writes a line of JSON to stderr."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event, **values}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


def log_request(record: Record) -> None:
    """Writes a request's line. `path` is shortened: it is the only text that comes from the client."""
    level = "error" if record.failed else "warning" if record.status == 429 else "info"
    ttft = None if record.first_token is None else round(record.first_token - record.started, 4)
    values = {
        "request_id": record.id,
        "method": record.method,
        "path": record.path[:200],
        "status": record.status,
        "model": record.model or None,
        "seconds": round(time.monotonic() - record.started, 4),
        "streamed": record.streamed or None,
        "prompt_tokens": record.prompt_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "first_token_seconds": ttft,
        "finish_reasons": record.finish_reasons or None,
        "code": record.code or None,
        "detail": record.detail[:2000] or None,
    }
    log(level, "request", **{name: value for name, value in values.items() if value is not None})
