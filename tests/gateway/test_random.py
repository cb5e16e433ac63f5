"""Random and hostile requests to a live gateway: each gets an answer or its own error, and the gateway goes on."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from builder.gateway.requests import ChatRequest, CompletionRequest
from tests.gateway.conftest import MODEL, Running
from tests.gateway.test_limits import connect, eventually, in_progress

WRONG = (400, 404, 405, 415, 429)  # what a client's mistake gets
LONE = "\ud800"  # half of a character, which JSON can write and UTF-8 cannot
# Token ids other than 0 and 1 at the start: with these the stand-in waits.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -2.5, 1e-300, 1e300, 2**31, 2**63, 10**4200, "", "x", "界 ", LONE, [], {},
    [7], ["a", "b"], [[7, 1], [3]], {"a": 1}, {"1": 5}, {"9" * 5000: 1}, {"include_usage": True}, {"self": 1},
    {"continue_final": True}, {"add_generation_prompt": LONE}, {"strftime_now": 1},
]  # fmt: skip
CONTENTS: list[Any] = ["Hello", "", "Grüße 🎉", LONE, "<|im_end|>", "{{ 7 }}", None, 5,
                       [{"type": "text", "text": "part"}], [{"type": "image_url"}]]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def message(pick: random.Random) -> dict[str, Any]:
    made = {"role": pick.choice(["user", "assistant", "system", "tool", "developer", "king"]),
            "content": pick.choice(CONTENTS)}  # fmt: skip
    if pick.random() < 0.2:
        made[pick.choice(["name", "reasoning_content", LONE, "self"])] = pick.choice([*VALUES, nested(300)])
    if pick.random() < 0.2:
        arguments = pick.choice(["{}", "[" * 10000, "NaN", "no JSON", LONE])
        made["tool_calls"] = pick.choice([[{"function": {"name": "f", "arguments": arguments}}], [{}], []])
    return made


def request(pick: random.Random) -> tuple[str, str, bytes]:
    """Method, path and body: mostly a valid request with a few fields changed, sometimes bytes of any kind."""
    if pick.random() < 0.1:
        path = pick.choice(["/v1/chat/completions", "/v1/completions", "/v1/models", "/%ff", "/v1/models/%ed%a0%80"])
        return pick.choice(["GET", "POST", "PUT", "DELETE", "HEAD"]), path, pick.randbytes(pick.randrange(200))
    chat = pick.random() < 0.5
    fields = ChatRequest.model_fields if chat else CompletionRequest.model_fields
    body: dict[str, Any] = {"model": MODEL, "max_tokens": pick.randrange(1, 20), "stream": pick.random() < 0.5}
    if chat:
        body["messages"] = [message(pick) for _ in range(pick.randrange(1, 4))] if pick.random() < 0.4 else [
            {"role": "user", "content": "Hello"}]  # fmt: skip
    else:
        good = ["Hello", ["a", "b"], [5, 6], [[5], [6]], "Grüße"]
        body["prompt"] = pick.choice(VALUES if pick.random() < 0.3 else good)
    for name in pick.sample(sorted(fields), pick.choice([0, 0, 1, 2])):
        body[name] = pick.choice(VALUES)
    raw = json.dumps(body).encode()
    return "POST", f"/v1/{'chat/' if chat else ''}completions", raw[: pick.randrange(len(raw))] if (
        pick.random() < 0.05) else raw  # fmt: skip


def send(gateway: Running, seed: int) -> tuple[int, str]:
    """The status of a random request, and what it and its answer were. A tenth of the clients leave at once."""
    pick = random.Random(seed)
    method, path, body = request(pick)
    what = f"{seed}: {method} {path} {body[:300]!r}"
    if pick.random() < 0.1:
        with connect(gateway) as connection:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
        return 0, what
    connection = http.client.HTTPConnection(*gateway.address, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200 and method != "HEAD":
        assert json.loads(answer)["error"]["message"], what
    elif b"text/event-stream" in (response.getheader("Content-Type") or "").encode():
        assert answer.endswith(b"data: [DONE]\n\n"), (what, answer[-300:])
    return response.status, f"{what} -> {answer[:300]!r}"


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_requests_leave_the_gateway_alive(gateway: Running, client: openai.OpenAI, number: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: send(gateway, seed), range(number)))
    assert [what for status, what in found if status not in (0, 200, *WRONG)] == []
    counts = Counter(status for status, _ in found)
    assert counts[200] > number // 10, "many of the requests are valid"
    assert counts[400] > number // 10, "many are not"
    assert eventually(lambda: in_progress(gateway) == 0)
    assert gateway.child.poll() is None
    assert client.completions.create(model=MODEL, prompt="one two", max_tokens=2).choices[0].finish_reason == "length"
    assert [line for line in gateway.lines if line.get("level") == "error"] == []
