"""The gateway's traces, as a collector gets them over OTLP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from builder.gateway import telemetry
from builder.serving.gateway import KILL_SECONDS
from builder.serving.server import Server
from builder.triton import repository
from tests.gateway.conftest import MODEL, Running, running

SECRET, KEY, COLLECTOR_KEY = "Grüße from nobody", "sk-of-a-client", "key-of-the-collector"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TALK: Any = [{"role": "user", "content": SECRET}]
# Nothing is sent before the end, so that what arrives was sent by it.
NEVER = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}


@dataclass
class Collector:
    """What came to a collector's /v1/traces: the bodies, and the headers of each."""

    url: str
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def spans(self) -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [s for r in requests for resource in r.resource_spans for sc in resource.scope_spans for s in sc.spans]

    def resource(self) -> dict[str, Any]:
        return attributes(ExportTraceServiceRequest.FromString(self.bodies[0]).resource_spans[0].resource)


def attributes(span: Any) -> dict[str, Any]:
    def value(found: Any) -> Any:
        kind = found.WhichOneof("value")
        return [value(one) for one in found.array_value.values] if kind == "array_value" else getattr(found, kind)

    return {one.key: value(one.value) for one in span.attributes}


@contextmanager
def collector(delay: float = 0.0) -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay)
            assert self.path == "/v1/traces"
            found.bodies.append(body)
            found.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    found = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stopped(own: Running) -> float:
    """Seconds that it takes to stop the gateway."""
    own.child.terminate()
    began = time.monotonic()
    assert own.child.wait(30) == 0
    return time.monotonic() - began


def asked(own: Running) -> None:
    """One request of each kind, good and bad."""
    with own.client(api_key=KEY) as client:
        follows: Any = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=5, extra_headers=follows)
        list(client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=6, n=2, stream=True))
        client.completions.create(model=MODEL, prompt=SECRET, max_tokens=3, stop=["nowhere"])
        client.responses.create(model=MODEL, input=SECRET, max_output_tokens=4)
        client.models.list()
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=SECRET, prompt=SECRET)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=SECRET * 500)
    with own.client(api_key="nobody's") as client, pytest.raises(openai.AuthenticationError):
        client.models.list(extra_headers={"traceparent": f"00-{TRACE}-nothing"})


@pytest.fixture(scope="module")
def traced(echo_repository: repository.Repository, triton: Server) -> Iterator[tuple[Collector, Running]]:
    """A collector, and the gateway that sent it the spans of `asked`."""
    with collector() as found:
        env = NEVER | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": found.url,
            "OTEL_EXPORTER_OTLP_HEADERS": f"x-key={COLLECTOR_KEY}",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=here",
        }
        with running(echo_repository.path, triton.grpc_url, keys=(KEY,), env=env) as own:
            asked(own)
            assert not found.bodies
            stopped(own)
        yield found, own


def named(found: Collector, name: str) -> list[Any]:
    return [span for span in found.spans() if span.name == name]


def test_each_request_is_one_span(traced: tuple[Collector, Running]) -> None:
    found, own = traced
    logged = {line["request_id"]: line for line in own.lines if line.get("event") == "request"}
    spans = {attributes(span)["http.response.header.x-request-id"][0]: span for span in found.spans()}
    assert len(found.spans()) == len(spans) == 8
    assert spans.keys() == logged.keys()
    for id, span in spans.items():
        assert span.kind == span.SPAN_KIND_SERVER
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert seconds == pytest.approx(logged[id]["seconds"], abs=0.05)
        assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 300
        assert attributes(span)["http.response.status_code"] == logged[id]["status"]
        assert attributes(span).get("error.type") == (
            (logged[id].get("code") or str(logged[id]["status"])) if logged[id]["status"] >= 400 else None
        )
        assert attributes(span)["server.address"] == "127.0.0.1"
        assert attributes(span)["server.port"] == own.address[1]
        assert span.status.code == span.status.STATUS_CODE_UNSET, "no fault of the server"
    assert found.headers[0]["x-key"] == COLLECTOR_KEY
    assert found.resource() | {"service.name": "trtllm-builder-gateway", "deployment.environment.name": "here"} == (
        found.resource()
    )


def test_answers_have_the_attributes_of_generative_ai(traced: tuple[Collector, Running]) -> None:
    found, _ = traced
    whole, streamed, responses = named(found, f"chat {MODEL}")
    [completion] = named(found, f"text_completion {MODEL}")[:1]
    for span, route, tokens, reasons in (
        (whole, "/v1/chat/completions", 5, ["length"]),
        (streamed, "/v1/chat/completions", 12, ["length"] * 2),
        (responses, "/v1/responses", 4, ["length"]),
        (completion, "/v1/completions", 3, ["length"]),
    ):
        shown = attributes(span)
        assert shown["http.route"] == route
        assert shown["gen_ai.request.model"] == shown["gen_ai.response.model"] == MODEL
        assert shown["gen_ai.operation.name"] == span.name.split()[0]
        assert shown["gen_ai.usage.output_tokens"] == tokens
        assert shown["gen_ai.usage.input_tokens"] > 3
        assert shown["gen_ai.response.finish_reasons"] == reasons
        assert shown["gen_ai.request.stream"] is (span is streamed)
        [first] = span.events
        assert first.name == "gen_ai.first_token"
        assert span.start_time_unix_nano < first.time_unix_nano < span.end_time_unix_nano
    ttft = attributes(streamed)["gen_ai.response.time_to_first_chunk"]
    assert ttft == pytest.approx((streamed.events[0].time_unix_nano - streamed.start_time_unix_nano) / 1e9, abs=0.001)
    assert "gen_ai.response.time_to_first_chunk" not in attributes(whole)


def test_a_span_follows_the_clients(traced: tuple[Collector, Running]) -> None:
    followed = [span for span in traced[0].spans() if span.trace_id.hex() == TRACE]
    assert [(span.name, span.parent_span_id.hex()) for span in followed] == [(f"chat {MODEL}", PARENT)]
    others = [span for span in traced[0].spans() if span.trace_id.hex() != TRACE]
    assert not any(span.parent_span_id for span in others), "also with a traceparent that is none"
    assert len({span.trace_id for span in others}) == len(others) == 7


def test_spans_hold_no_texts_and_no_keys(traced: tuple[Collector, Running]) -> None:
    sent = b"".join(traced[0].bodies)
    assert MODEL.encode() in sent
    for secret in (SECRET, "nobody", KEY, COLLECTOR_KEY, "nowhere"):
        assert secret.encode() not in sent


def test_an_engine_that_fails_is_an_error(echo_repository: repository.Repository) -> None:
    """And the exporter's own endpoint, which is used as it is."""
    with collector() as found:
        env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{found.url}/v1/traces", "OTEL_SERVICE_NAME": "mine"}
        with running(echo_repository.path, "127.0.0.1:9", env=env) as own, own.client() as client:
            with pytest.raises(openai.InternalServerError):
                client.completions.create(model=MODEL, prompt="x")
            stopped(own)
        [span] = found.spans()
        assert span.status.code == span.status.STATUS_CODE_ERROR
        assert attributes(span)["http.response.status_code"] == 503
        assert attributes(span)["error.type"]
        assert found.resource()["service.name"] == "mine"


def test_a_collector_that_never_answers_delays_nothing(echo_repository: repository.Repository, triton: Server) -> None:
    with collector(delay=20) as found:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": found.url, "OTEL_BSP_SCHEDULE_DELAY": "10"}
        with running(echo_repository.path, triton.grpc_url, env=env) as own, own.client(timeout=5) as client:
            for _ in range(4):
                client.completions.create(model=MODEL, prompt="x", max_tokens=2)
            assert telemetry.FLUSH_SECONDS <= stopped(own) < KILL_SECONDS
        assert "traces lost" in [line.get("event") for line in own.lines]


def test_a_collector_that_is_not_there_is_named_once(echo_repository: repository.Repository, triton: Server) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "10"}
    with running(echo_repository.path, triton.grpc_url, env=env) as own, own.client(timeout=5) as client:
        for _ in range(4):
            client.completions.create(model=MODEL, prompt="x", max_tokens=2)
            time.sleep(0.3)
        assert stopped(own) < KILL_SECONDS
    said = [line["detail"] for line in own.lines if line.get("event") == "traces"]
    assert said
    assert len(set(said)) == len(said)
    assert not [line for line in own.lines if "text" in line], "all lines of the log are JSON"


OFF = """
import json, os, sys
from builder.gateway import app, server, telemetry
for environment, blocked in json.loads(sys.argv[1]):
    os.environ.update(environment)
    sys.modules.update(dict.fromkeys(blocked))
    assert telemetry.traces() is None
    assert not any(name.startswith("opentelemetry") for name in set(sys.modules) - set(blocked))
    for name in environment:
        del os.environ[name]
    print(json.dumps({"event": "next"}), file=sys.stderr)
"""
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
# (environment, modules that can't be imported, what the log says)
CASES: list[tuple[dict[str, str], list[str], str]] = [
    ({}, [], ""),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, [], ""),
    (ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, [], ""),
    (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, [], ""),
    (ENDPOINT | {"OTEL_TRACES_EXPORTER": "console"}, [], "OTEL_TRACES_EXPORTER is console"),
    (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, [], "The OTLP protocol is grpc"),
    (ENDPOINT, ["opentelemetry"], "Install it: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"),
]


def test_without_traces_nothing_is_imported() -> None:
    """A wrong setting is a warning: the variables may be those of a whole cluster."""
    argv = [sys.executable, "-c", OFF, json.dumps([case[:2] for case in CASES])]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    for _, _, says in CASES:
        said = []
        while (line := lines.pop(0))["event"] != "next":
            assert (line["event"], line["level"]) == ("traces off", "warning")
            said.append(line["detail"])
        assert len(said) == bool(says)
        assert all(says in detail for detail in said)
    assert not lines


def test_the_packages_that_are_named_are_those_of_the_extra() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["telemetry"]
    assert {one.partition(">")[0] for one in wanted} == set(telemetry.PACKAGES)
