"""Clients that leave, do not read, send too much or too slowly: each is ended, and no other one notices."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from builder.serving.server import Server
from builder.triton import repository
from tests.gateway.conftest import MODEL, Running, running

SLOW = "! wait"  # the stand-in waits 50 ms before each token of such an answer
KEY = "sk-secret-key"


@pytest.fixture(scope="module")
def strict(echo_repository: repository.Repository, triton: Server) -> Iterator[Running]:
    """A gateway with small limits and an API key."""
    limits = {"requests": 4, "body": 20000, "header": 4000, "header_seconds": 1.0, "seconds": 3.0}
    with running(echo_repository.path, triton.grpc_url, keys=("other", KEY), **limits) as found:
        yield found


def body(**options: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "one two", "max_tokens": 4, **options}).encode()


def head(length: int, *, path: str = "/v1/completions", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{more}"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def connect(gateway: Running) -> socket.socket:
    return socket.create_connection(gateway.address, timeout=20)


def status(connection: socket.socket) -> int:
    """The status of a response, whose connection is then closed."""
    with connection:
        received = b""
        while b"\r\n" not in received:
            part = connection.recv(4096)
            assert part, "closed without a response"
            received += part
    return int(received.split(b" ")[1])


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.05)
    return False


def answers(gateway: Running) -> bool:
    with gateway.client(api_key=KEY) as client:
        return bool(client.completions.create(model=MODEL, prompt="one", max_tokens=1).choices)


def logged(gateway: Running, id: str, status: int) -> bool:
    return any(line.get("request_id") == id and line["status"] == status for line in gateway.lines)


def in_progress(gateway: Running) -> float:
    return metric(gateway, "gateway_answers_in_progress")


def metric(gateway: Running, name: str) -> float:
    _, text = get(f"{gateway.url}/metrics")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer_at_once(gateway: Running, triton: Server, stream: bool) -> None:
    """Streamed or not: the engine stops, which it writes into the server's log."""
    asked = body(prompt=SLOW, max_tokens=400, stream=stream)
    before = triton.log.read_text().count("stopped after")
    connections = [connect(gateway) for _ in range(20)]
    for connection in connections:
        connection.sendall(head(len(asked)) + asked)
    assert eventually(lambda: in_progress(gateway) == 20)
    for connection in connections:
        connection.close()
    left = time.monotonic()
    assert eventually(lambda: in_progress(gateway) == 0)
    assert eventually(lambda: triton.log.read_text().count("stopped after") == before + 20)
    assert time.monotonic() - left < 5, "not after the 20 s that the answers take"
    assert eventually(lambda: sum(line.get("status") == 499 for line in gateway.lines) >= 20)


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_falls_silent_ends_the_answer(
    echo_repository: repository.Repository, triton: Server, stream: bool
) -> None:
    """After the first token; the engine is told to stop, and others are answered."""
    with running(echo_repository.path, triton.grpc_url, silent_seconds=1.0) as own, own.client() as client:
        asked: Any = {"model": MODEL, "prompt": '" x', "max_tokens": 40}
        before = triton.log.read_text().count("stopped after")
        with pytest.raises(openai.APIError, match="The model server sent nothing for 1 s"):
            list(client.completions.create(**asked, stream=True)) if stream else client.completions.create(**asked)
        assert eventually(lambda: triton.log.read_text().count("stopped after") > before)
        assert client.completions.create(model=MODEL, prompt=SLOW, max_tokens=30).choices[0].text


def test_a_client_that_leaves_does_not_end_another_answer_with_its_id(gateway: Running) -> None:
    asked = body(prompt=SLOW, max_tokens=20)
    stays, leaves = connect(gateway), connect(gateway)
    for connection in (stays, leaves):
        connection.sendall(head(len(asked), more="X-Request-Id: the-same\r\n") + asked)
    assert eventually(lambda: in_progress(gateway) == 2)
    leaves.close()
    assert status(stays) == 200
    assert eventually(lambda: logged(gateway, "the-same", 200))
    [found] = [line for line in gateway.lines if line.get("request_id") == "the-same" and line["status"] == 200]
    assert found["completion_tokens"] == 20


def test_a_stop_string_stops_the_engine(gateway: Running, triton: Server) -> None:
    before = triton.log.read_text().count("stopped after")
    with gateway.client() as client:
        found = client.completions.create(model=MODEL, prompt=SLOW, max_tokens=400, stop="ait")
    assert found.choices[0].finish_reason == "stop"
    assert eventually(lambda: triton.log.read_text().count("stopped after") == before + 1)


def test_a_client_that_never_reads_is_ended_and_memory_is_bounded(
    echo_repository: repository.Repository, triton: Server
) -> None:
    asked = body(max_tokens=8000, stream=True, n=4)
    limits = {"stalled_seconds": 1.0, "stalled_bytes": 100_000}
    with running(echo_repository.path, triton.grpc_url, **limits) as own, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(own.address)
        connection.sendall(head(len(asked)) + asked)
        assert eventually(lambda: any(line.get("status") == 499 for line in own.lines), 60)
        assert in_progress(own) == 0
        assert answers(own)


def test_a_client_that_closes_its_half_of_the_connection_has_left(gateway: Running) -> None:
    asked = body(prompt=SLOW, max_tokens=400)
    with connect(gateway) as connection:
        connection.sendall(head(len(asked)) + asked)
        assert eventually(lambda: in_progress(gateway) == 1)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert eventually(lambda: in_progress(gateway) == 0)


def test_the_bodies_of_all_requests_are_bounded(strict: Running) -> None:
    """32 times that of one: those that arrive slowly count, too, and one that is refused is not awaited."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(strict)) for _ in range(34)]
        for connection in connections:
            connection.sendall(head(20000) + b"x" * 19999)
        assert eventually(lambda: sum(line.get("code") == "too_many_bytes" for line in strict.lines) >= 2)
        assert {line["status"] for line in strict.lines if line.get("code") == "too_many_bytes"} == {429}
        refused = 0
        for connection in connections:
            connection.settimeout(5)
            received = b""
            while part := connection.recv(4096):  # up to its end
                received += part
            refused += received.startswith(b"HTTP/1.1 429 ")
            assert received.startswith((b"HTTP/1.1 429 ", b"HTTP/1.1 408 "))
        assert refused == 2
    assert answers(strict)


def test_too_many_answers_get_429_with_retry_after(strict: Running) -> None:
    with strict.client(api_key=KEY) as client, ThreadPoolExecutor(4) as pool:
        slow = [
            pool.submit(client.completions.create, model=MODEL, prompt=SLOW, max_tokens=30) for _ in range(4)
        ]  # fmt: skip
        assert eventually(lambda: in_progress(strict) == 4)
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert raised.value.response.headers["retry-after"] == "1"
        assert raised.value.code == "too_many_requests"
        assert all(one.result().choices[0].finish_reason == "length" for one in slow)


def test_an_answer_that_takes_too_long(strict: Running) -> None:
    with strict.client(api_key=KEY) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            client.completions.create(model=MODEL, prompt=SLOW, max_tokens=200)
        assert raised.value.status_code == 504
        stream = client.completions.create(model=MODEL, prompt=SLOW, max_tokens=200, stream=True)
        with pytest.raises(openai.APIError, match="took longer than 3 s"):
            list(stream)
    assert eventually(lambda: in_progress(strict) == 0)


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x"])
def test_a_wrong_api_key(strict: Running, key: str) -> None:
    with strict.client(api_key=key or "-") as client, pytest.raises(openai.AuthenticationError) as raised:
        client.models.list()
    assert raised.value.code == "invalid_api_key"
    assert KEY not in str(raised.value)


def test_a_body_behind_a_wrong_key_is_not_awaited(strict: Running) -> None:
    """The connection is closed: a client without a key can't hold it by sending a body slowly."""
    with connect(strict) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{")
        received = b""
        while part := connection.recv(4096):  # up to its end
            received += part
    assert received.startswith(b"HTTP/1.1 401 ")


def test_a_right_api_key_and_paths_that_need_none(strict: Running) -> None:
    with strict.client(api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
    assert get(f"{strict.url}/health/live")[0] == 200
    assert get(f"{strict.url}/health/ready")[0] == 200


def test_large_bodies_and_headers(strict: Running) -> None:
    large = body(prompt="x" * 30000)
    for sent, expected in (
        (head(len(large)) + large, 413),
        (head(4, more="X-Large: " + "x" * 5000 + "\r\n") + b"null", 431),
        (b"GET /" + b"x" * 200_000, 431),
        (b"\x16\x03\x01 no HTTP\r\n\r\n", 400),
        (head(4) + b"null", 400),
    ):
        connection = connect(strict)
        connection.sendall(sent)
        assert status(connection) == expected
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode()
    chunked += b"\r\nTransfer-Encoding: chunked\r\n\r\n" + b"7530\r\n" + b"x" * 30000 + b"\r\n"
    connection = connect(strict)
    connection.sendall(chunked)
    assert status(connection) == 413
    assert answers(strict)


def test_a_body_that_arrives_together_with_its_head_is_no_head(gateway: Running) -> None:
    """uvloop passes on pieces of up to 256,000 bytes."""
    asked = body(stop="x" * 200_000)
    for _ in range(3):
        connection = connect(gateway)
        connection.sendall(head(len(asked)) + asked)
        assert status(connection) == 400


def test_headers_and_bodies_that_do_not_arrive(strict: Running) -> None:
    start = time.monotonic()
    for sent in (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", head(100) + b"{", b""):
        connection = connect(strict)
        connection.sendall(sent)
        assert status(connection) == 408
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v2/models/ensemble", 404),
     ("OPTIONS", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)  # fmt: skip
def test_other_paths_and_methods(gateway: Running, method: str, path: str, expected: int) -> None:
    request = urllib.request.Request(f"{gateway.url}{path}", method=method, headers={"Origin": "http://evil"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=20)
    with raised.value as error:
        assert error.code == expected
        assert not [name for name in error.headers if name.lower().startswith("access-control")], "CORS is off"
        assert json.loads(error.read())["error"]["message"]


def test_the_log_and_metrics_say_what_happened_without_texts(gateway: Running) -> None:
    assert eventually(lambda: in_progress(gateway) == 0)
    before = metric(gateway, "gateway_completion_tokens_total")
    with gateway.client() as client:
        client.completions.create(
            model=MODEL, prompt="a private text", max_tokens=7, extra_headers={"X-Request-Id": "mine-1"}
        )
    assert eventually(lambda: metric(gateway, "gateway_completion_tokens_total") == before + 7)
    assert eventually(lambda: logged(gateway, "mine-1", 200))
    [line] = [line for line in gateway.lines if line.get("request_id") == "mine-1"]
    assert {"status": 200, "completion_tokens": 7, "finish_reasons": ["length"], "path": "/v1/completions"}.items() <= (
        line.items()
    )
    assert "private" not in json.dumps(gateway.lines)


def test_requests_in_progress_are_finished_at_the_end(echo_repository: repository.Repository, triton: Server) -> None:
    with running(echo_repository.path, triton.grpc_url) as own, own.client() as client, ThreadPoolExecutor(1) as pool:
        idle = connect(own)  # a connection without a request does not delay the end
        asked = pool.submit(client.completions.create, model=MODEL, prompt=SLOW, max_tokens=20)
        assert eventually(lambda: in_progress(own) == 1)
        own.child.terminate()
        assert asked.result().choices[0].finish_reason == "length"
        ended = time.monotonic()
        assert own.child.wait(20) == 0
        assert time.monotonic() - ended < 3
        idle.close()


def test_without_a_model_server(echo_repository: repository.Repository, tmp_path: Path) -> None:
    with running(echo_repository.path, "127.0.0.1:9") as alone, alone.client() as client:
        assert get(f"{alone.url}/health/live")[0] == 200
        code, text = get(f"{alone.url}/health/ready")
        assert (code, json.loads(text)["error"]["code"]) == (503, "not_ready")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as raised:
                client.completions.create(model=MODEL, prompt="x", stream=stream)
            assert raised.value.status_code == 503
            assert raised.value.response.headers["retry-after"] == "1"
