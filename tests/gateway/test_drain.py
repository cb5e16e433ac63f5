"""A gateway that is stopped: requests in progress are finished, and no client can delay its end."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from builder.serving import health
from builder.serving.server import Server
from builder.triton import repository
from tests.gateway.conftest import MODEL, Running, running
from tests.gateway.test_limits import SLOW, body, connect, eventually, head, in_progress
from tests.triton.test_models import echo

DRAIN = 3  # seconds, of conftest.py


def streamed(own: Running, tokens: int) -> str:
    with own.client() as client:
        events = client.completions.create(model=MODEL, prompt=SLOW, max_tokens=tokens, stream=True)
        return "".join(event.choices[0].text for event in events if event.choices)


def test_streams_are_finished_and_idle_clients_are_not_awaited(
    echo_repository: repository.Repository, triton: Server
) -> None:
    with running(echo_repository.path, triton.grpc_url) as own, ThreadPoolExecutor(8) as pool:
        unused, used = connect(own), connect(own)
        used.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert used.recv(4096).startswith(b"HTTP/1.1 200")
        asked = [pool.submit(streamed, own, 20) for _ in range(8)]
        assert eventually(lambda: in_progress(own) == 8)
        own.child.terminate()
        assert [one.result() for one in asked] == [echo(SLOW, 20)] * 8
        answered = time.monotonic()
        assert own.child.wait(20) == 0
        assert time.monotonic() - answered < DRAIN
        for one in (unused, used):
            one.close()


def test_the_health_check_of_containers(echo_repository: repository.Repository, triton: Server) -> None:
    with running(echo_repository.path, triton.grpc_url) as own:
        assert health.main(["health", "--gateway", own.url.removeprefix("http://")]) == 0
    assert health.main(["health", "--gateway", own.url.removeprefix("http://")]) == 1
    with running(echo_repository.path, "127.0.0.1:9") as alone:
        assert health.gateway_fault(alone.url.removeprefix("http://"), 12.0).startswith('{"error": ')


def test_a_client_that_never_reads_does_not_outlast_the_drain(
    echo_repository: repository.Repository, triton: Server
) -> None:
    asked = body(max_tokens=8000, stream=True, n=4)
    with running(echo_repository.path, triton.grpc_url) as own, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(own.address)
        connection.sendall(head(len(asked)) + asked)
        assert eventually(lambda: in_progress(own) == 4)
        own.child.terminate()
        start = time.monotonic()
        assert own.child.wait(30) == 0
        assert time.monotonic() - start < DRAIN + 8, "the drain, and five seconds for the engine to stop"
        assert eventually(lambda: any(line.get("code") == "shutting_down" for line in own.lines))
        assert not [line for line in own.lines if "Traceback" in json.dumps(line)]


def test_a_whole_answer_that_is_cut_off_is_an_error(echo_repository: repository.Repository, triton: Server) -> None:
    with running(echo_repository.path, triton.grpc_url) as own, ThreadPoolExecutor(1) as pool, own.client() as client:
        asked = pool.submit(client.completions.create, model=MODEL, prompt=SLOW, max_tokens=400)
        assert eventually(lambda: in_progress(own) == 1)
        own.child.terminate()
        with pytest.raises(openai.InternalServerError, match="stopped before the answer was complete"):
            asked.result()
        assert own.child.wait(30) == 0
