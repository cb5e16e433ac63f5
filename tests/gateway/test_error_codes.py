"""The same fault gets the same code on every way to the model; where Triton maps it otherwise, the table says so.

The stand-in for the engine fails with the error that the prompt's first character names.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from builder.core.output import Output
from builder.recipe import schema
from builder.serving.server import Server, ServerOptions, serve
from tests.gateway.conftest import ECHO, MAX_INPUT_LEN, Running, running, write_repository
from tests.triton.test_models import TINY, inputs, post

FULL, LATE, BROKEN = "#", "%", "$"
FAILING = f"""
CODES = {{{TINY.encode(FULL).ids[0]}: ("UNAVAILABLE", "Exceeds maximum queue size"),
         {TINY.encode(LATE).ids[0]}: ("UNAVAILABLE", "Request timeout expired"),
         {TINY.encode(BROKEN).ids[0]}: ("INTERNAL", "the engine failed")}}
_answer = TritonPythonModel.answer
def answer(self, request_id, inputs, sender):
    code = CODES.get(int(inputs["input_ids"].flat[0]))
    if code is None:
        return _answer(self, request_id, inputs, sender)
    error = pb_utils.TritonError(code[1], getattr(pb_utils.TritonError, code[0]))
    sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
TritonPythonModel.answer = answer
"""
FAULTS: dict[str, dict[str, Any]] = {
    "bad value": {"text_input": "Hello", "max_tokens": 0},
    "too long": {"text_input": "7" * (MAX_INPUT_LEN + 1), "max_tokens": 1},
    "queue full": {"text_input": FULL, "max_tokens": 1},
    "waited too long": {"text_input": LATE, "max_tokens": 1},
    "engine failed": {"text_input": BROKEN, "max_tokens": 1},
}
# fault -> the gateway's status, that of HTTP /infer, and gRPC's code. This is the table in docs/guides/serving.md.
EXPECTED = {
    "bad value": (400, 400, "INVALID_ARGUMENT"),
    "too long": (400, 400, "INVALID_ARGUMENT"),
    "queue full": (429, 503, "UNAVAILABLE"),
    "waited too long": (429, 503, "UNAVAILABLE"),
    "engine failed": (500, 500, "INTERNAL"),
}
GENERATE = 400  # of /generate and /generate_stream for every error of a model: Triton 24.10, http_server.cc


@dataclass(frozen=True)
class Served:
    triton: Server
    gateway: Running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tmp = tmp_path_factory.mktemp("codes")
    backend = tmp / "failing.py"
    backend.write_text(ECHO.read_text() + FAILING)
    found = write_repository(tmp, schema.Repository(), max_batch_size=8, max_seq_len=512)
    options = ServerOptions(engine_backend=backend)
    with (
        serve(found.models, out=Output("quiet"), log=tmp / "log", options=options) as triton,
        running(found.path, triton.grpc_url) as gateway,
    ):
        yield Served(triton, gateway)


def by_gateway(served: Served, body: dict[str, Any]) -> int:
    """The status of /v1/completions, which must be an error."""
    with served.gateway.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt=body["text_input"], max_tokens=body["max_tokens"])
    return caught.value.status_code


def by_http(served: Served, model: str, verb: str, body: dict[str, Any]) -> int:
    if verb == "infer":
        kinds = {str: "BYTES", int: "INT32"}
        body = {"inputs": [{"name": name, "datatype": kinds[type(value)], "shape": [1, 1], "data": [value]}
                           for name, value in body.items()]}  # fmt: skip
    status, text = post(served.triton, model, verb, body)
    assert "error" in json.loads(text.removeprefix("data: "))
    return status


def by_grpc(served: Served, model: str, body: dict[str, Any]) -> InferenceServerException:
    with (
        grpcclient.InferenceServerClient(served.triton.grpc_url) as client,
        pytest.raises(InferenceServerException) as caught,
    ):
        client.infer(model, inputs(**body), client_timeout=30)
    return caught.value


def by_stream(served: Served, model: str, body: dict[str, Any]) -> str:
    """The message of a gRPC stream. It has no code: the header triton_grpc_error adds it, but can crash Triton."""
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(served.triton.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer(model, inputs(**body), enable_empty_final_response=True)
        error = answers.get(timeout=30)
    return str(error.message()) if error else "none"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_one_code_on_every_way(served: Served, fault: str) -> None:
    body = FAULTS[fault]
    streamed = {**body, "stream": True}
    gateway, http, grpc = EXPECTED[fault]
    assert by_gateway(served, body) == gateway
    assert by_http(served, "ensemble_infer", "infer", body) == http
    error = by_grpc(served, "ensemble_infer", body)
    assert str(error.status()) == f"StatusCode.{grpc}"
    assert error.message() in by_stream(served, "ensemble", body)
    assert error.message() == by_stream(served, "tensorrt_llm_bls", body)
    assert error.message() == by_stream(served, "tensorrt_llm_bls", streamed)
    for model, verb, asked in (
        ("ensemble", "generate", body), ("tensorrt_llm_bls", "generate", body),
        ("tensorrt_llm_bls", "generate_stream", streamed),
    ):  # fmt: skip
        assert by_http(served, model, verb, asked) == GENERATE


def test_the_guide_has_this_table() -> None:
    text = Path("docs/guides/serving.md").read_text()
    for fault, (gateway, http, grpc) in EXPECTED.items():
        assert f"| {fault} | {gateway} | {http} | {GENERATE} | {grpc} |" in text


def test_a_missing_model_is_not_found_on_every_way(served: Served) -> None:
    body = FAULTS["bad value"]
    with served.gateway.client() as client, pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="a", max_tokens=1)
    assert by_http(served, "none", "infer", body) == 404
    assert str(by_grpc(served, "none", body).status()) == "StatusCode.NOT_FOUND"


@pytest.mark.slow
def test_requests_that_fail_in_the_engine_leave_the_server_alive(served: Served) -> None:
    """When tensorrt_llm_bls asked for codes in its streams, 61 to 486 of these ended the server."""
    for _ in range(1500):
        assert by_stream(served, "tensorrt_llm_bls", FAULTS["engine failed"]) == "the engine failed"
    assert served.triton.child.poll() is None
