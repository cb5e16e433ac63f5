"""A server that runs but no longer answers is reported: real Triton, real processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.core import supervisor
from builder.core.errors import ServingError
from builder.core.output import Output
from builder.recipe import schema
from builder.serving import health
from builder.serving import server as serving
from builder.serving.readiness import answers_ok
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from tests.triton.test_models import ECHO, generate, inputs
from tests.triton.test_repository import SNAPSHOT, write_engine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    part = schema.Repository(bls_instances=1)
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, part)
    options = ServerOptions(engine_backend=ECHO, exit_timeout=1)
    with serve(tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=options) as server:
        yield server


def stubs(server: Server) -> list[int]:
    ours = set(supervisor.descendants(server.pid))
    return [pid for pid, name, _, _ in supervisor.processes() if name.startswith("triton_python") and pid in ours]


def probe(server: Server) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builder.serving.health", server.http_url], capture_output=True, text=True, timeout=60
    )


def test_a_killed_process_of_a_model_is_reported_within_seconds(server: Server) -> None:
    assert health.fault(server.http_url) == ""
    assert probe(server).returncode == 0
    assert not server.lost_a_model()
    found = stubs(server)
    assert len(found) == 5
    os.kill(found[-1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ServingError, match="is running but no longer answers") as caught:
        health.watch(server.http_url, server.wait, server.lost_a_model)
    assert caught.value.exit_code == 5
    assert "The process of a model has ended" in caught.value.why
    elapsed = time.monotonic() - start
    assert elapsed < health.PERIOD, "by the look at the processes, before the first probe"
    # Triton's own health endpoint does not show it.
    assert answers_ok(server.http_url, "/v2/health/ready")


def test_a_server_that_lost_a_model_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean exit can take a second for each of a model's processes; a server without a wait is killed."""
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    monkeypatch.setattr(serving, "BROKEN_SECONDS", 0.0)
    options = ServerOptions(engine_backend=ECHO)
    with serve(tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=options) as server:
        os.kill(stubs(server)[-1], signal.SIGKILL)
        while not server.lost_a_model():
            time.sleep(0.05)
    assert server.child.returncode == -signal.SIGKILL


def test_failing_requests_are_reported_without_a_look_at_the_processes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a server in a container."""
    for pid in stubs(server):
        os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(health, "PERIOD", 0.1)
    with pytest.raises(ServingError, match="is running but no longer answers") as caught:
        health.watch(server.http_url, server.wait)
    assert "3 consecutive requests for one token failed. The last one: ensemble: " in caught.value.why
    done = probe(server)
    assert done.returncode == 1
    assert done.stderr.startswith("ensemble: ")


def test_the_exit_code_of_a_server_is_returned(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PERIOD", 0.2)
    threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL)).start()
    assert health.watch(server.http_url, server.wait, server.lost_a_model) == -signal.SIGKILL


def test_a_busy_server_is_healthy(server: Server) -> None:
    """The only instance is busy with a stream of ten seconds, and the probe's token waits for it."""
    import tritonclient.grpc as grpcclient

    first = threading.Event()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: first.set())
        client.async_stream_infer("tensorrt_llm_bls", inputs(text_input="! wait", max_tokens=200, stream=True))
        assert first.wait(10)
        assert health.fault(server.http_url, patience=1.0) == ""
        client.stop_stream(cancel_requests=True)
    assert generate(server, "tensorrt_llm_bls", text_input="Hello", max_tokens=1)


def test_a_server_that_does_not_run_is_reported() -> None:
    assert "refused" in health.fault("127.0.0.1:1")
