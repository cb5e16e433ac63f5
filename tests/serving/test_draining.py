"""A server that stops loses no request and does not wait for idle clients: real Triton, real connections."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.core import process
from builder.core.output import Output
from builder.recipe import schema
from builder.serving import connections, draining
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository, stream_capacity
from tests.triton.test_models import ECHO, LIMITS, echo, generate, stream
from tests.triton.test_repository import SNAPSHOT, write_engine

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = "! wait"


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, socket.socket, socket.socket]]:
    """A port, and both ends of a connection to it."""
    monkeypatch.setattr(connections, "QUIET_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listener.accept()
            with server:
                yield port, client, server


def is_idle(port: int) -> bool:
    [found] = connections.established(port)
    return found.is_idle


def test_a_connection_is_idle_unless_an_answer_is_missing_or_arrives(
    pair: tuple[int, socket.socket, socket.socket],
) -> None:
    port, client, server = pair
    assert is_idle(port), "nothing was ever sent"
    client.send(b"request")
    assert not is_idle(port), "the request was not read yet"
    server.recv(99)
    time.sleep(0.5)
    assert not is_idle(port), "the answer may take long"
    server.send(b"answer")
    assert not is_idle(port), "more of it may follow"
    client.recv(99)
    time.sleep(0.5)
    assert is_idle(port)
    time.sleep(0.05)
    client.send(b"request")
    server.recv(99)
    assert not is_idle(port)


def test_an_answer_within_one_clock_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "QUIET_SECONDS", 1.0)
    monkeypatch.setattr(connections, "UNCLEAR_SECONDS", 5.0)

    def found(acknowledged: float, age: float) -> bool:
        return connections.Connection(1, 1, 0, age, age, acknowledged, unused=False).is_idle

    assert (found(0.5, 0.9), found(0.5, 1.1)) == (False, True), "an answer was acknowledged"
    assert (found(2.0, 2.0), found(5.1, 5.1)) == (False, True), "perhaps a request was received"


def test_the_connections_of_a_process_are_closed(pair: tuple[int, socket.socket, socket.socket]) -> None:
    port, client, _ = pair
    with socket.create_connection(("127.0.0.1", port)) as other:
        found = [one for one in connections.established(port) if one.client_port == client.getsockname()[1]]
        assert connections.close(found, os.getpid())
        assert client.recv(9) == b""
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.recv(9)
        assert other.getsockname()[1] in connections.ports_to(port, [os.getpid()])
        assert connections.ports_to(port, [1 << 30]) == set()


def test_requests_of_processes_that_have_ended_do_not_count(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).write_bytes(b"     3")
    (tmp_path / str(1 << 30)).write_bytes(b"     4")
    assert draining.in_progress(tmp_path) == 3


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(connections, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(connections, "UNCLEAR_SECONDS", 1.0)
    engine = write_engine(tmp_path / "engine", build_config=LIMITS)
    repository.write(tmp_path / "models", engine, SNAPSHOT, schema.Repository())
    options = ServerOptions(engine_backend=ECHO)
    with serve(tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=options) as server:
        yield server


def idle(server: Server) -> socket.socket:
    """A client that stays connected after an answer."""
    host, port = server.http_url.split(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(LIVE)
    assert client.recv(4096).startswith(b"HTTP/1.1 200")
    return client


def test_requests_that_wait_in_a_model_are_answered(server: Server) -> None:
    """Triton alone closes its gRPC port first, and tensorrt_llm_bls can't send them to the engine any more."""
    carried = stream_capacity.threads(LIMITS["max_batch_size"])
    with idle(server), ThreadPoolExecutor(carried + 12) as pool:
        # First: the ensemble's request is counted nowhere, and must be there when the server is stopped.
        whole = [
            pool.submit(generate, server, model, text_input=SLOW, max_tokens=40)
            for model in ("ensemble", "ensemble_infer")
        ]
        streams = [pool.submit(stream, server, text_input=SLOW, max_tokens=20, stream=True) for _ in range(carried + 8)]
        deadline = time.monotonic() + 20
        while draining.in_progress(server.draining.requests) < carried + 9:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.draining.stop(40)
        stopped = time.monotonic()
        assert server.child.returncode == 0
        for one in streams:
            assert "".join(one.result()) == echo(SLOW, 20)
        for other in whole:
            assert other.result() == echo(SLOW, 40)
    assert time.monotonic() - stopped < 2, "the answers were there before the server had stopped"


@pytest.mark.slow
def test_idle_clients_do_not_delay_the_end(server: Server) -> None:
    with idle(server), idle(server):
        start = time.monotonic()
        server.draining.stop(40)
        assert server.child.returncode == 0
        assert time.monotonic() - start < 20, "Triton alone waits 30 seconds"


def test_where_idle_connections_can_not_be_closed_the_server_is_killed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where no process may take another's descriptors."""
    monkeypatch.setattr(connections, "_PIDFD_GETFD", 1 << 20)
    with idle(server):
        answered = generate(server, "tensorrt_llm_bls", text_input="Hello", max_tokens=1)  # the model is connected
        start = time.monotonic()
        server.draining.stop(40)
        assert time.monotonic() - start < 20
        assert server.child.poll() is None, "left to the caller, which kills it"
    assert answered == echo("Hello", 1)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_asked(server: Server) -> None:
    [triton] = server.draining.servers()
    os.kill(triton, signal.SIGSTOP)
    start = time.monotonic()
    server.draining.stop(2)
    assert time.monotonic() - start < 6
    assert server.child.poll() is None
    process.kill(server.child)


@pytest.mark.slow
def test_a_request_that_never_ends_is_cut_off(server: Server) -> None:
    failed = threading.Event()

    def ask() -> None:
        try:
            stream(server, text_input=SLOW, max_tokens=200, stream=True)
        except Exception:
            failed.set()

    threading.Thread(target=ask, daemon=True).start()
    deadline = time.monotonic() + 10
    while not draining.in_progress(server.draining.requests):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.draining.stop(1.5)
    assert server.child.poll() is None
    process.kill(server.child)
    assert failed.wait(20)
