"""Traces for OpenTelemetry, if the environment names a collector: a span for each request, without prompts and answers.

The names of attributes are those of opentelemetry-semantic-conventions 0.66b2, for HTTP servers and generative AI. The
packages are optional, and are imported only if there is a collector. Neither they nor a collector that fails stop the
gateway.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from builder import __version__
from builder.gateway.record import Record, log

FLUSH_SECONDS = 2.0  # at the end, for the spans that wait; less than builder.serving.gateway.KILL_SECONDS
REPEAT_SECONDS = 60.0  # between two log lines with the same complaint of OpenTelemetry's
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
PROTOCOL = "http/protobuf"
PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")  # the extra "telemetry"


class Traces:
    """Makes the spans and sends them, in a thread of its own."""

    def __init__(self) -> None:
        """ImportError without the packages; other errors if the environment says something that they don't take."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create(_resource()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("trtllm-builder", __version__)
        self._parent = TraceContextTextMapPropagator().extract
        self._kind, self._error = SpanKind.SERVER, Status(StatusCode.ERROR)

    def add(self, record: Record, route: str, scope: Scope) -> None:
        """Adds the span of a request that has just ended, below the span that its `traceparent` names."""
        now, ended = time.time_ns(), time.monotonic()

        def at(moment: float) -> int:
            return now - int((ended - moment) * 1e9)

        operation = OPERATIONS.get(route)
        name = f"{operation} {record.model}" if operation and record.model else f"{record.method} {route}"
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        span = self._tracer.start_span(
            name,
            context=self._parent(headers),
            kind=self._kind,
            start_time=at(record.started),
            attributes={**_http(record, route, scope), **_generation(record, operation)},
        )
        if record.first_token is not None:
            span.add_event("gen_ai.first_token", timestamp=at(record.first_token))
        if record.failed:
            span.set_status(self._error)
        span.end(now)

    def close(self) -> None:
        """Sends what waits. A collector that does not answer delays the end by FLUSH_SECONDS at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(FLUSH_SECONDS)
        if closing.is_alive():
            log("warning", "traces lost", detail=f"The collector did not answer within {FLUSH_SECONDS:.0f} s.")


def traces() -> Traces | None:
    """The traces that the environment asks for, by OpenTelemetry's own variables; None if it asks for none."""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if not endpoint or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return None
    try:
        _check(exporter)
        made = Traces()
    except ImportError as error:
        why = f"{error}. Install it: pip install {' '.join(PACKAGES)}"
    except Exception as error:  # OpenTelemetry's, for a value that it does not take
        why = f"{type(error).__name__}: {error}"
    else:
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.addHandler(_Log())
        log("info", "traces on")
        return made
    # The gateway goes on: the variables may be those of a whole cluster.
    log("warning", "traces off", detail=why)
    return None


def _check(exporter: str) -> None:
    """ValueError if the environment asks for a way of sending that the gateway does not have."""
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if exporter != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER is {exporter}; the gateway has otlp only.")
    if protocol and protocol != PROTOCOL:
        raise ValueError(f"The OTLP protocol is {protocol}; the gateway has {PROTOCOL} only (a collector's port 4318).")


class _Log(logging.Handler):
    """OpenTelemetry's complaints, such as a collector that does not answer, as lines of the gateway's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: dict[object, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line, unless the same complaint was written a short time ago."""
        now = time.monotonic()
        if now - self._last.get(record.msg, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._last[record.msg] = now
            log("warning", "traces", detail=record.getMessage()[:500])


def _resource() -> Mapping[str, str]:
    """What describes this process, besides OTEL_RESOURCE_ATTRIBUTES."""
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {"service.version": __version__} | ({} if named else {"service.name": "trtllm-builder-gateway"})


def _http(record: Record, route: str, scope: Scope) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": route,
        "http.response.status_code": record.status,
        "http.response.header.x-request-id": [record.id],
        "url.scheme": scope.get("scheme", "http"),
    }
    if scope.get("server"):
        found["server.address"], port = scope["server"]
        found |= {"server.port": port} if port else {}
    if record.status >= 400 or record.code:
        found["error.type"] = record.code or str(record.status)
    return found


def _generation(record: Record, operation: str | None) -> dict[str, Any]:
    """Attributes of a request for an answer."""
    if operation is None:
        return {}
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tensorrt_llm",
        "gen_ai.request.stream": record.streamed,
    }
    if record.model:
        found |= {"gen_ai.request.model": record.model, "gen_ai.response.model": record.model}
    if record.prompt_tokens:
        found["gen_ai.usage.input_tokens"] = record.prompt_tokens
        found["gen_ai.usage.output_tokens"] = record.completion_tokens
    if record.finish_reasons:
        found["gen_ai.response.finish_reasons"] = record.finish_reasons
    if record.streamed and record.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = record.first_token - record.started
    return found
