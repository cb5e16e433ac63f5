"""The process of a model is replaced; a server that no longer answers is reported: real Triton, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.core import supervisor
from builder.core.errors import ServingError
from builder.core.output import Output
from builder.recipe import schema
from builder.serving import draining, health, recovery
from builder.serving.readiness import answers_ok
from builder.serving.recovery import Recovery
from builder.serving.server import Server, ServerOptions, serve
from builder.serving.watchdog import Watchdog
from builder.triton import repository, stream_capacity
from tests.triton.test_models import ECHO, echo, generate, inputs
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
    found = [row for row in supervisor.processes() if row[0] in ours and row[1].startswith("triton_python")]
    return [pid for pid, _, state, _ in found if state != "Z"]


def probe(server: Server) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builder.serving.health", server.http_url], capture_output=True, text=True, timeout=60
    )


def of_model(server: Server, name: str) -> int:
    """The process of a model."""
    server.processes.ended()
    return next(pid for pid, model in server.processes._names.items() if model == name and pid in stubs(server))


class Watching:
    """`health.watch` in a thread, with what it reported. It ends with the server."""

    def __init__(self, server: Server) -> None:
        self.reports: list[str] = []
        self.failure: ServingError | None = None
        self.watchdog = Watchdog(server.log.with_name("watchdog.json"), self.reports.append)
        recovery = Recovery(server.http_url, server.processes, self.watchdog)
        self.thread = threading.Thread(target=self.watch, args=(server, recovery))
        self.thread.start()

    def watch(self, server: Server, recovery: Recovery) -> None:
        try:
            health.watch(server.http_url, server.wait, recovery, self.watchdog.probed)
        except ServingError as error:
            self.failure = error

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in report for report in self.reports):
            assert time.monotonic() < deadline, self.reports
            assert self.failure is None, self.failure
            time.sleep(0.05)


KILLED = dict.fromkeys(
    ("preprocessing", "postprocessing", "tensorrt_llm_bls", "ensemble_infer", "tensorrt_llm"), signal.SIGKILL
)


@pytest.mark.parametrize(
    "signals",
    [
        {"preprocessing": signal.SIGKILL, "tensorrt_llm_bls": signal.SIGSTOP},
        pytest.param(KILLED, marks=pytest.mark.slow),
        pytest.param(dict.fromkeys(KILLED, signal.SIGSTOP), marks=pytest.mark.slow),
    ],
    ids=["two", "killed", "stopped"],
)
def test_the_process_of_each_model_is_replaced(server: Server, signals: dict[str, signal.Signals]) -> None:
    assert health.fault(server.http_url) == ""
    assert probe(server).returncode == 0
    assert not server.lost_a_model()
    watching = Watching(server)
    for model, number in signals.items():
        os.kill(of_model(server, model), number)
        watching.wait_for(f"{model}: answers again", 30)
        for name in ("ensemble", "ensemble_infer", "tensorrt_llm_bls"):
            assert generate(server, name, text_input="Hello", max_tokens=3) == echo("Hello", 3)
    assert len(watching.reports) == 2 * len(signals)
    assert not server.lost_a_model()


def test_a_model_that_dies_again_and_again_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MOST", 1)
    monkeypatch.setattr(recovery, "CONFIRM_SECONDS", 0.1)
    watching = Watching(server)
    os.kill(of_model(server, "preprocessing"), signal.SIGKILL)
    watching.wait_for("preprocessing: answers again", 30)
    os.kill(of_model(server, "preprocessing"), signal.SIGKILL)
    watching.thread.join(30)
    assert watching.failure is not None
    assert watching.failure.exit_code == 5
    assert "The process of preprocessing has ended 2 times in 10 minutes." in watching.failure.why
    # Triton's own health endpoint does not show it.
    assert answers_ok(server.http_url, "/v2/health/ready")


def test_a_model_that_can_not_be_loaded_again_is_given_up_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of the llmapi target, which needs a GPU. The message claims no earlier end of the process."""
    monkeypatch.setattr(recovery, "CONFIRM_SECONDS", 0.1)
    monkeypatch.setattr(server.processes, "load_again", lambda pid: False)
    watching = Watching(server)
    os.kill(of_model(server, "preprocessing"), signal.SIGKILL)
    watching.thread.join(30)
    assert watching.failure is not None
    assert watching.failure.why == "The process of preprocessing has ended."
    assert watching.reports == []


def test_a_server_that_lost_a_model_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean exit can take a second for each of a model's processes; a server without a wait is killed."""
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    monkeypatch.setattr(draining, "BROKEN_SECONDS", 0.0)
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
    assert health.watch(server.http_url, server.wait) == -signal.SIGKILL


def test_a_busy_server_is_healthy(server: Server) -> None:
    """Every thread is busy with a stream of ten seconds, and the probe's token waits for one."""
    import tritonclient.grpc as grpcclient

    busy, threads = set[str](), stream_capacity.threads(8)

    def answered(result: Any, error: Any) -> None:
        if result is not None:
            busy.add(result.get_response().id)

    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(answered)
        for number in range(threads):
            values = inputs(text_input="! wait", max_tokens=200, stream=True)
            client.async_stream_infer("tensorrt_llm_bls", values, request_id=str(number))
        deadline = time.monotonic() + 10
        while len(busy) < threads:
            assert time.monotonic() < deadline, busy
            time.sleep(0.05)
        assert health.fault(server.http_url, patience=1.0) == ""
        client.stop_stream(cancel_requests=True)
    assert generate(server, "tensorrt_llm_bls", text_input="Hello", max_tokens=1)


def test_a_server_that_does_not_run_is_reported() -> None:
    assert "refused" in health.fault("127.0.0.1:1")
