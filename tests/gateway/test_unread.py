"""Clients that read nothing, read slowly, or send slowly, over real sockets with small buffers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from builder.serving.server import Server
from builder.triton import repository
from tests.gateway.conftest import Running, running
from tests.gateway.test_limits import answers, body, connect, eventually, head, in_progress, metric

STALLED = 1.0  # seconds
ANSWERS = 128
# 0.5 MB after few tokens, more than the kernel holds: the prompt comes back with each answer; a token is 16 spaces.
LARGE = body(prompt=" " * 4000, max_tokens=4, n=ANSWERS, echo=True)
# The same, before the slow tokens of 20 seconds (SLOW).
STREAM = body(prompt="! " + " " * 3900, max_tokens=400, n=ANSWERS, echo=True, stream=True)


@pytest.fixture(scope="module")
def own(echo_repository: repository.Repository, triton: Server) -> Iterator[Running]:
    limits = {"stalled_seconds": STALLED, "header_seconds": 1.0, "idle_seconds": 1.0}
    with running(echo_repository.path, triton.grpc_url, **limits) as found:
        yield found


def sent(own: Running, data: bytes) -> socket.socket:
    """A connection with a small buffer, on which this was sent and nothing is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(own.address)
    connection.sendall(data)
    return connection


def request(asked: bytes, id: str = "mine") -> bytes:
    return head(len(asked), more=f"X-Request-Id: {id}\r\n") + asked


def lines(own: Running, id: str) -> list[dict[str, object]]:
    return [line for line in own.lines if line.get("event") == "request" and line.get("request_id") == id]


def cut_off(connection: socket.socket) -> bool:
    """Whether the gateway has closed the connection without sending all."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("kind", ["stream", "whole"])
def test_a_client_that_never_reads_is_cut_off(own: Running, triton: Server, kind: str) -> None:
    before, stopped = metric(own, "gateway_stalled_total"), triton.log.read_text().count("stopped after")
    with sent(own, request(STREAM if kind == "stream" else LARGE, kind)) as connection:
        assert eventually(lambda: metric(own, "gateway_stalled_total") == before + 1, 60)
        assert eventually(lambda: in_progress(own) == 0)
        assert cut_off(connection)
    [line] = lines(own, kind)
    if kind == "stream":
        assert (line["status"], line["code"]) == (499, "client_stalled")
        assert eventually(lambda: triton.log.read_text().count("stopped after") == stopped + ANSWERS)
    else:  # its answer was complete, and waited for the client
        assert line["status"] == 200
    [noted] = [line for line in own.lines if line.get("event") == "client stalled" and line["request_id"] == kind]
    assert noted["level"] == "warning"
    assert 0 < int(noted["unread_bytes"]) < 5 << 20
    assert answers(own)


def test_a_request_behind_an_answer_that_nobody_reads(own: Running) -> None:
    """Pipelined: it waits for the first answer to leave, and so does its place among the answers in progress."""
    with sent(own, request(LARGE, "first") + request(body(), "second")) as connection:
        assert eventually(lambda: bool(lines(own, "second")), 60)
        assert cut_off(connection)
    assert [(line["status"], line["code"]) for line in lines(own, "second")] == [(499, "client_stalled")]
    assert eventually(lambda: in_progress(own) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_slowly_but_steadily_gets_all(own: Running, stream: bool) -> None:
    asked = body(prompt=" " * 4000, max_tokens=4, n=ANSWERS, echo=True, stream=stream)
    before = metric(own, "gateway_stalled_total")
    with sent(own, request(asked, "slow")) as connection:
        received, start = bytearray(), time.monotonic()
        while time.monotonic() < start + 3 * STALLED:  # of which it reads an eighth of the answer
            received += connection.recv(2048)
            time.sleep(0.1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while b"[DONE]" not in received[-100:] and not received.endswith(b"}}}"):
            part = connection.recv(1 << 16)
            assert part, "cut off"
            received += part
    assert metric(own, "gateway_stalled_total") == before
    texts = received.count(b'"finish_reason": "length"')
    assert texts == ANSWERS


def test_a_client_that_leaves_while_another_request_waits_behind_its_stream(own: Running) -> None:
    with sent(own, request(STREAM, "ahead") + request(STREAM, "behind")) as connection:
        assert connection.recv(9) == b"HTTP/1.1 "
        assert eventually(lambda: in_progress(own) == ANSWERS)
    assert eventually(lambda: in_progress(own) == 0)
    assert [line["status"] for line in lines(own, "ahead")] == [499]


def closed(connection: socket.socket, drip: bytes, seconds: float = 6.0) -> bytes:
    """What a client receives up to the end of its connection, while it goes on sending a byte at a time."""
    connection.settimeout(0.1)
    received, end, at = b"", time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            connection.sendall(drip[at % len(drip) :][:1])
            at += 1
            part = connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return received
        if not part:
            return received
        received += part
    raise AssertionError(f"still open after {seconds} s: {received!r}")


@pytest.mark.parametrize(
    ("first", "drip", "expected"),
    [(b"", b"GET /health/live HTTP/1.1\r\nX-Header: " + b"x" * 200, b"HTTP/1.1 408 "),
     (head(4000), b"x", b"HTTP/1.1 408 "),
     (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", b"HTTP/1.1 200 "),
     (b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n", b"x", b"HTTP/1.1 200 "),
     (b"GET /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n", b"x", b"HTTP/1.1 200 "),
     (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\nGET /health/live HTTP/1.1\r\n", b"x", b"HTTP/1.1 200 ")],
    ids=["headers", "body", "between", "unread", "chunks", "next"],
)  # fmt: skip
def test_a_client_that_sends_a_byte_at_a_time_is_ended(
    own: Running, first: bytes, drip: bytes, expected: bytes
) -> None:
    with connect(own) as connection:
        connection.sendall(first)
        assert closed(connection, drip).startswith(expected)


def test_a_connection_without_requests_is_closed(own: Running) -> None:
    with connect(own) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(4096)
            assert received.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.6)  # each request starts the time again
        assert connection.recv(4096) == b""
