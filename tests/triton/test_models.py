"""The models of a rendered repository on a real Triton server, with a stand-in for the engine (echo_backend.py).

The stand-in repeats the prompt's tokens, so every answer is known in advance.
"""

from __future__ import annotations

import ast
import functools
import http.client
import json
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from tritonclient.utils import InferenceServerException

from builder.core import paths
from builder.core.output import Output
from builder.recipe import schema
from builder.serving.installation import find_server
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from tests.triton.test_repository import SNAPSHOT, write_engine

ECHO = Path(__file__).parents[1] / "support" / "echo_backend.py"
TINY = Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json"))
EMOJI = "Grüße, 世界 🎉 "
LIMITS = {"max_batch_size": 8, "max_input_len": 128, "max_seq_len": 256, "plugin_config": {}}
REPEATED = ("prefix_ids", "without_repeated_prefix", "context_ids", "Vocabulary", "release_memory")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp = tmp_path_factory.mktemp("served")
    part = schema.Repository(bls_instances=1, max_queue_delay_microseconds=2000)
    repository.write(tmp / "models", write_engine(tmp / "engine"), SNAPSHOT, part)
    with serve(
        tmp / "models", out=Output("quiet"), log=tmp / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        yield server


def echo(prompt: str, tokens: int) -> str:
    """The stand-in's answer: the prompt's token ids, repeated."""
    ids = TINY.encode(prompt).ids
    return TINY.decode((ids * tokens)[:tokens], skip_special_tokens=True)


def post(server: Server, model: str, verb: str, body: Any) -> tuple[int, Any]:
    url = f"http://{server.http_url}/v2/models/{model}/{verb}"
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Connection": "close", "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def generate(server: Server, model: str, **body: Any) -> str:
    status, text = post(server, model, "generate", body)
    assert status == 200, text
    answer: str = json.loads(text)["text_output"]
    return answer


def rejection(server: Server, model: str, verb: str = "generate", **body: Any) -> str:
    status, text = post(server, model, verb, body)
    assert status == 400, text
    message: str = json.loads(text.removeprefix("data: "))["error"]
    assert "Traceback" not in message
    assert "model.py" not in message
    return message


TYPES = {"text_input": "BYTES", "stop_words": "BYTES", "stream": "BOOL", "end_id": "INT32", "max_tokens": "INT32",
         "beam_width": "INT32", "temperature": "FP32", "top_p": "FP32", "length_penalty": "FP32",
         "repetition_penalty": "FP32", "presence_penalty": "FP32", "frequency_penalty": "FP32", "top_k": "INT32",
         "min_tokens": "INT32", "pad_id": "INT32", "num_return_sequences": "INT32", "return_context_logits": "BOOL",
         "embedding_bias_words": "BYTES", "embedding_bias_weights": "FP32"}  # fmt: skip


def inputs(**values: Any) -> list[grpcclient.InferInput]:
    made = []
    for name, value in values.items():
        rows = value if isinstance(value, list) else [[value]]
        kind = {"BYTES": object, "BOOL": bool, "INT32": np.int32, "FP32": np.float32}[TYPES[name]]
        array = np.array([[v.encode() if isinstance(v, str) else v for v in row] for row in rows], dtype=kind)
        made.append(grpcclient.InferInput(name, array.shape, TYPES[name]))
        made[-1].set_data_from_numpy(array)
    return made


def infer(server: Server, model: str, **values: Any) -> str:
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        output = client.infer(model, inputs(**values), client_timeout=30).as_numpy("text_output")
    assert output.shape == (1, 1)
    text: str = output[0, 0].decode()
    return text


def stream(server: Server, model: str = "tensorrt_llm_bls", **values: Any) -> list[str]:
    """The chunks of one gRPC stream."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, inputs(**values), enable_empty_final_response=True)
        chunks: list[str] = []
        while True:
            result, error = answers.get(timeout=30)
            if error:
                raise error
            if (array := result.as_numpy("text_output")) is not None:
                chunks += [text.decode() for text in array.reshape(-1)]
            if result.get_response().parameters["triton_final_response"].bool_param:
                return chunks


@pytest.mark.parametrize(("prompt", "tokens"), [("Hello there", 20), (EMOJI, 31), ("def f(x):\n    return x", 1)])
def test_every_endpoint_gives_the_same_answer(server: Server, prompt: str, tokens: int) -> None:
    expected = echo(prompt, tokens)
    request = {"text_input": prompt, "max_tokens": tokens}
    assert generate(server, "ensemble", **request) == expected
    assert generate(server, "ensemble_infer", **request) == expected
    assert generate(server, "tensorrt_llm_bls", **request) == expected
    assert infer(server, "ensemble_infer", **request) == expected
    assert stream(server, **request) == [expected]
    assert stream(server, "ensemble", **request) == [expected]
    chunks = stream(server, **request, stream=True)
    assert "".join(chunks) == expected
    assert len(chunks) > 1 or tokens == 1


def test_http_infer(server: Server) -> None:
    body = {
        "inputs": [
            {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": [EMOJI]},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [9]},
        ]
    }
    status, text = post(server, "ensemble_infer", "infer", body)
    assert (status, json.loads(text)["outputs"][0]["data"]) == (200, [echo(EMOJI, 9)])
    # This is why ensemble_infer exists. Once Triton supports it, ensemble_infer can be removed.
    assert post(server, "ensemble", "infer", body)[0] == 501


def test_generate_stream(server: Server) -> None:
    body = {"text_input": EMOJI, "max_tokens": 12, "stream": True}
    status, text = post(server, "tensorrt_llm_bls", "generate_stream", body)
    events = [json.loads(line[6:])["text_output"] for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert "".join(events) == echo(EMOJI, 12)
    assert len(events) > 1


def test_an_answer_that_ends_inside_a_character(server: Server) -> None:
    ids = TINY.encode("🎉").ids
    assert len(ids) > 1
    expected = echo("🎉", len(ids) + 1)
    assert expected.endswith("�")
    assert stream(server, text_input="🎉", max_tokens=len(ids) + 1, stream=True) == ["🎉", expected[1:]]


def test_every_end_token_of_the_model_ends_the_answer(server: Server) -> None:
    """The engine supports one end id. The model has two, and the second is passed as a stop word."""
    for end in ("<|im_end|>", "<|endoftext|>"):
        assert generate(server, "ensemble", text_input=f"Hello{end} there", max_tokens=20) == "Hello"
        assert "".join(stream(server, text_input=f"Hello{end} there", max_tokens=20, stream=True)) == "Hello"
    # A client's own end_id replaces both.
    assert generate(server, "ensemble", text_input="a<|endoftext|>b<|im_end|>", max_tokens=7, end_id=-1) == "abab"


def test_an_empty_answer_is_one_response(server: Server) -> None:
    assert stream(server, text_input="<|im_end|>", max_tokens=5, stream=True) == [""]
    assert generate(server, "ensemble", text_input="<|im_end|>", max_tokens=5) == ""


def test_stop_words(server: Server) -> None:
    request = {"text_input": "one two three", "max_tokens": 30}
    assert generate(server, "ensemble", **request, stop_words=[" two"]) == "one two"
    assert "".join(stream(server, **request, stop_words=[["", " three", " four"]], stream=True)) == "one two three"
    assert generate(server, "ensemble", **request, stop_words="", bad_words="") == echo("one two three", 30)


REJECTED = [
    ({"text_input": "", "max_tokens": 1}, "text_input is empty"),
    ({"text_input": "Hello", "max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
    ({"text_input": "Hello", "max_tokens": -5}, "max_tokens is -5; it must be 1 or more"),
    ({"text_input": "7" * 200, "max_tokens": 1}, "has 200 tokens; this engine takes 128 (max_input_len)"),
    ({"text_input": "x" * 100_000, "max_tokens": 1}, "has 100000 characters, too many for the 128 tokens"),
    ({"text_input": "7" * 100, "max_tokens": 200}, "has 100 tokens and max_tokens is 200, together 300; this engine"
     " takes 256 (max_seq_len): max_tokens can be 156"),
    ({"text_input": "Hello", "max_tokens": 1, "embedding_bias_words": ["a"]}, "embedding_bias_words and embedd"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), REJECTED)
def test_an_invalid_request_is_rejected_with_the_reason(server: Server, body: dict[str, Any], message: str) -> None:
    assert message in rejection(server, "ensemble", **body)
    assert message in rejection(server, "tensorrt_llm_bls", **body)
    assert message in rejection(server, "tensorrt_llm_bls", "generate_stream", **body, stream=True)


def test_infer_returns_the_error_code_of_an_invalid_request(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="max_tokens is 0") as caught:
        infer(server, "ensemble_infer", text_input="Hello", max_tokens=0)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


BAD_SAMPLING = [
    ({"temperature": -1.0}, "temperature is -1; it must be a finite number of 0 or more"),
    ({"temperature": float("nan")}, "temperature is nan; it must be a finite number of 0 or more"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_p": 1.5}, "top_p is 1.5; it must be from 0 to 1"),
    ({"top_p": -0.5}, "top_p is -0.5; it must be from 0 to 1"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"top_k": -3}, "top_k is -3; it must be 0 or more"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0; it must be a finite number above 0"),
    ({"presence_penalty": float("inf")}, "presence_penalty is inf; it must be a finite number"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
    ({"length_penalty": float("nan")}, "length_penalty is nan"),
    ({"min_tokens": -1}, "min_tokens is -1; it must be 0 or more"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0; it must be 1 or more"),
    ({"beam_width": 0}, "beam_width is 0; this engine takes 1 to 1 (max_beam_width)"),
    ({"beam_width": 2}, "beam_width is 2; "),
    ({"end_id": 4096}, "end_id is 4096; it must be a token id below 4096, or -1 for none"),
    ({"pad_id": -2}, "pad_id is -2; it must be a token id below 4096"),
    ({"return_context_logits": True}, "return_context_logits needs an engine built with gather_context_logits"),
    ({"embedding_bias_words": "a", "embedding_bias_weights": float("nan")}, "weights must be finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_SAMPLING)
def test_an_invalid_sampling_value_is_rejected_by_every_endpoint(
    server: Server, bad: dict[str, Any], message: str
) -> None:
    request = {"text_input": "Hello", "max_tokens": 2, **bad}
    if all(not isinstance(value, float) or np.isfinite(value) for value in bad.values()):  # JSON has no NaN
        for model in ("ensemble", "ensemble_infer", "tensorrt_llm_bls"):
            assert message in rejection(server, model, **request)
        body = {"inputs": [{"name": name, "datatype": TYPES[name], "shape": [1, 1], "data": [value]}
                           for name, value in request.items()]}  # fmt: skip
        assert post(server, "ensemble_infer", "infer", body)[0] == 400
    with pytest.raises(InferenceServerException) as caught:
        infer(server, "ensemble_infer", **request)
    assert message in caught.value.message()
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    for model in ("ensemble", "tensorrt_llm_bls"):
        with pytest.raises(InferenceServerException) as caught:
            stream(server, model, **request)
        assert message in caught.value.message()


@pytest.mark.parametrize("model", ["ensemble_infer", "tensorrt_llm_bls", "ensemble"])
def test_required_inputs_are_declared(server: Server, model: str) -> None:
    """Except by the ensemble: Triton would not respond at all then (see triton-tensors.json)."""
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        config = client.get_model_config(model).config
    optional = {entry.name for entry in config.input if entry.optional}
    assert ({"text_input", "max_tokens"} <= optional) == (model == "ensemble")
    assert {"stop_words", "temperature"} <= optional


def test_neutral_sampling_values_are_accepted(server: Server) -> None:
    neutral = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "beam_width": 1,
    }
    assert infer(server, "ensemble_infer", text_input="Hello", max_tokens=3, **neutral) == echo("Hello", 3)
    assert generate(server, "ensemble", text_input="Hello", max_tokens=3, **neutral) == echo("Hello", 3)


@pytest.mark.parametrize("model", ["ensemble", "ensemble_infer", "tensorrt_llm_bls"])
def test_a_missing_input_is_reported(server: Server, model: str) -> None:
    others: dict[str, Any] = {"stop_words": ["a"], "end_id": 1, "pad_id": 1}
    assert "text_input is missing" in rejection(server, model, max_tokens=3, **others)
    assert "max_tokens is missing" in rejection(server, model, text_input="Hello", **others)
    # If they are declared as required, Triton reports them itself when there are too few inputs.
    for name, request in (("text_input", {"max_tokens": 3}), ("max_tokens", {"text_input": "Hello"})):
        message = f"{name} is missing" if model == "ensemble" else f"missing required input(s) ['{name}']"
        assert message in rejection(server, model, **request)
    assert "0 inputs" in rejection(server, model, unknown=1)
    with pytest.raises(InferenceServerException, match="text_input is missing"):
        stream(server, model, max_tokens=3, end_id=1)


def test_a_request_that_cannot_be_streamed_is_rejected(server: Server) -> None:
    request = {"text_input": "Hello", "max_tokens": 3, "stream": True}
    assert "send streaming requests to tensorrt_llm_bls" in rejection(server, "ensemble", **request)
    assert "does not stream" in rejection(server, "ensemble_infer", **request)
    assert "beam_width is 2" in rejection(server, "tensorrt_llm_bls", "generate_stream", **request, beam_width=2)


def test_invalid_requests_do_not_affect_others_in_their_batch(server: Server) -> None:
    """Concurrent requests share batches. Each gets its own answer or its own error."""
    cases: list[tuple[bytes | str, int]] = [(f"request {i} 🎉", 8) for i in range(12)]
    cases[1::4] = [(b"\xff\xfe caf\xe9", 8), ("7" * 200, 8), ("", 8)]
    found: list[str] = [""] * len(cases)

    def send(i: int) -> None:
        try:
            found[i] = infer(server, "ensemble_infer", text_input=cases[i][0], max_tokens=cases[i][1])
        except InferenceServerException as error:
            found[i] = error.message()

    for _ in range(5):
        threads = [threading.Thread(target=send, args=(i,)) for i in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[1] == "text_input is not valid UTF-8 at byte 0"
        assert found[5].startswith("the prompt has 200 tokens")
        assert found[9] == "text_input is empty"
        assert [found[i] for i in range(12) if i % 4 != 1] == [echo(*cases[i]) for i in range(12) if i % 4 != 1]  # type: ignore[arg-type]


def leave_grpc_stream(server: Server, model: str, **values: Any) -> None:
    client = grpcclient.InferenceServerClient(server.grpc_url)
    client.start_stream(lambda result, error: None)
    client.async_stream_infer(model, inputs(**values))
    time.sleep(0.5)
    client.stop_stream(cancel_requests=True)
    client.close()


def leave_grpc_infer(server: Server, model: str, **values: Any) -> None:
    client = grpcclient.InferenceServerClient(server.grpc_url)
    call = client.async_infer(model, inputs(**values), callback=lambda result, error: None)
    time.sleep(0.5)
    call.cancel()


def leave_http(server: Server, model: str, **values: Any) -> None:
    host, port = server.http_url.split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(values))
    time.sleep(0.5)
    connection.close()


def wait_until_stopped(server: Server, before: int) -> int:
    """How many tokens the engine had generated when it was stopped. `before`: where in the log to begin."""
    deadline = time.monotonic() + 5
    while not (found := re.search(rb"stopped after (\d+) tokens", server.log.read_bytes()[before:])):
        assert time.monotonic() < deadline, "the engine was not stopped"
        time.sleep(0.05)
    return int(found[1])


@pytest.mark.parametrize(
    ("leave", "model", "streams"),
    [
        (leave_grpc_stream, "tensorrt_llm_bls", True),
        (leave_grpc_stream, "tensorrt_llm_bls", False),
        (leave_grpc_stream, "ensemble_infer", False),
        (leave_grpc_infer, "ensemble_infer", False),
        (leave_http, "tensorrt_llm_bls", True),
    ],
)
def test_generation_stops_when_the_client_leaves(
    server: Server, leave: Callable[..., None], model: str, streams: bool
) -> None:
    """This prompt takes the stand-in 0.05 s per token and 10 s in total."""
    before = len(server.log.read_bytes())
    leave(server, model, text_input="! wait", max_tokens=200, stream=streams)
    assert wait_until_stopped(server, before) < 60
    assert "".join(stream(server, text_input="Hello", max_tokens=3, stream=True)) == echo("Hello", 3)


def test_a_full_queue_and_a_long_wait_are_rejected(tmp_path: Path) -> None:
    """With max_batch_size 1, two requests run. Of four more, one may wait, but after a second it is rejected too."""
    engine = write_engine(tmp_path / "engine", build_config={**LIMITS, "max_batch_size": 1})
    part = schema.Repository(max_queue_size=1, queue_timeout_seconds=1)
    repository.write(tmp_path / "models", engine, SNAPSHOT, part)
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        found = []

        def ask() -> None:
            try:
                found.append("".join(stream(server, text_input="! wait", max_tokens=50, stream=True)))
            except InferenceServerException as error:
                found.append(error.message())

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
            time.sleep(0.3)  # so that no two reach the engine's queue at once
        for thread in threads:
            thread.join()
    rejected = ["Exceeds maximum queue size"] * 3 + ["Request timeout expired"]
    assert sorted(found, key=len) == sorted([*rejected, *[echo("! wait", 50)] * 2], key=len)


def test_a_stream_of_a_stuck_engine_ends_with_an_error(tmp_path: Path) -> None:
    """The stand-in sends one token for this prompt. Other streams go on, and the stuck request is stopped."""
    part = schema.Repository(stall_timeout_seconds=1)
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, part)
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        other: list[str] = []
        busy = threading.Thread(
            target=lambda: other.extend(stream(server, text_input="! wait", max_tokens=50, stream=True))
        )
        busy.start()
        start = time.monotonic()
        with pytest.raises(InferenceServerException, match="the engine sent nothing for 1 seconds"):
            stream(server, text_input='" stall', max_tokens=50, stream=True)
        assert time.monotonic() - start < 10
        busy.join()
        assert "".join(other) == echo("! wait", 50)
        wait_until_stopped(server, 0)


def test_all_streams_of_a_stuck_engine_end_at_their_own_limit(tmp_path: Path) -> None:
    """The stand-in answers no request to stop one of these for 6 seconds, and the limit is 1. Others go on."""
    part = schema.Repository(stall_timeout_seconds=1)
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, part)
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        found: list[tuple[float, str]] = []

        def ask() -> None:
            start = time.monotonic()
            with pytest.raises(InferenceServerException) as error:
                stream(server, text_input="# stuck", max_tokens=50, stream=True)
            found.append((time.monotonic() - start, error.value.message()))

        threads = [threading.Thread(target=ask) for _ in range(32)]
        for thread in threads:
            thread.start()
        while len(found) < 32:
            assert "".join(stream(server, text_input="Hello", max_tokens=3, stream=True)) == echo("Hello", 3)
        for thread in threads:
            thread.join()
        seconds, messages = zip(*found, strict=True)
        assert set(messages) == {"the engine sent nothing for 1 seconds"}
        assert max(seconds) < 6


def test_an_engine_that_can_not_be_reached_is_an_error_at_once(tmp_path: Path) -> None:
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    model = tmp_path / "models" / "tensorrt_llm_bls" / "1" / "model.py"
    model.write_text(re.sub(r'os.environ.get\("BUILDER_TRITON_GRPC".*\)', '"127.0.0.1:9"', model.read_text()))
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        with pytest.raises(InferenceServerException, match="the engine can't be reached; see the server's log"):
            stream(server, text_input="Hello", max_tokens=5, stream=True)
        assert "BUILDER_TRITON_GRPC is not Triton's gRPC address" in server.log.read_text()


def test_without_streaming_the_ensemble_serves_infer(tmp_path: Path) -> None:
    part = schema.Repository(bls_instances=1, decoupled=False)
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, part)
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        request = {"text_input": EMOJI, "max_tokens": 9}
        assert infer(server, "ensemble", **request) == echo(EMOJI, 9)
        assert infer(server, "tensorrt_llm_bls", **request) == echo(EMOJI, 9)
        assert "decoupled: true" in rejection(server, "tensorrt_llm_bls", **request, stream=True)


def load(model: str) -> ModuleType:
    """Loads a model.py outside of a server, with the Python part of Triton's own pb_utils."""
    utils = next(file for file in find_server().python_backend if file.name == "triton_python_backend_utils.py")
    source = paths.data("triton_templates", "1.2", model, "1", "model.py")
    module = ModuleType(f"{model}_model")
    sys.path.insert(0, str(utils.parent))
    try:
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), module.__dict__)
    finally:
        sys.path.remove(str(utils.parent))
    return module


PREPROCESSING, BLS = load("preprocessing"), load("tensorrt_llm_bls")


def test_functions_that_are_repeated_in_several_models_are_equal() -> None:
    """Triton loads each model.py by itself, so they repeat a few functions; an edit must change all copies."""
    sources: dict[str, set[str]] = {}
    for file in paths.data("triton_templates").glob("*/*/1/model.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in REPEATED:
                sources.setdefault(node.name, set()).add(ast.unparse(node))
    assert {name: len(copies) for name, copies in sources.items()} == dict.fromkeys(REPEATED, 1)


class Sent:
    """In the place of an answer and its engine: `sent` is what its client would get."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[Any]]] = []
        self.cancelled, self.generation = False, self

    def outputs(self, response: Any) -> Any:
        if isinstance(response, Exception):
            raise response
        return response

    def send(self, response: tuple[str, list[Any]]) -> None:
        self.sent.append(response)


def token(id: int, extra: int | None = None) -> dict[str, Any]:
    outputs = {"output_ids": np.array([[[id]]]), "sequence_length": np.array([[1]])}
    return outputs if extra is None else outputs | {"extra": extra}


def test_tokens_that_wait_are_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not those that have outputs of their own. What came before an error is sent, and nothing after it."""
    monkeypatch.setattr(BLS, "tensor", lambda name, value: value)
    monkeypatch.setattr(BLS, "text_response", lambda texts, extra: (texts[0], extra))
    one, two, three = (TINY.encode(word).ids[0] for word in ("Hello", " there", " you"))
    answer = Sent()
    stream = BLS.Stream(answer, BLS.Detokenizer(BLS.Vocabulary(TINY, True), set(), []))
    stream.received.extend([token(one), token(two)])
    stream.forward()
    assert answer.sent == [(TINY.decode([one, two]), [])]
    stream.received.extend([token(one), token(two, 7), token(three), ValueError("late"), token(one)])
    stream.forward()
    assert answer.sent[1:] == [(TINY.decode([one, two]), [7]), (TINY.decode([three]), [])]
    assert isinstance(stream.ended.exception(), ValueError)
    stream.forward()
    assert len(answer.sent) == 3


def test_a_stream_ends_with_its_last_response_and_sends_nothing_to_clients_that_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BLS, "text_response", lambda texts, extra: (texts[0], extra))
    answer = Sent()
    stream = BLS.Stream(answer, BLS.Detokenizer(BLS.Vocabulary(TINY, True), set(), []))
    answer.cancelled = True
    stream.received.append(token(TINY.encode("Hello").ids[0]))
    stream.forward()
    assert not stream.ended.done()
    stream.received.append(None)
    stream.forward()
    assert stream.ended.result(0) is False
    assert answer.sent == []


CPP = """Encountered an error when fetching new request: [TensorRT-LLM][ERROR] Assertion failed: beamWidth > 0 \
(/src/tensorrt_llm/cpp/tensorrt_llm/executor/samplingConfig.cpp:131)
1       0x7f1234567890 tensorrt_llm::common::throwRuntimeError(char const*, int, std::string const&) + 82
2       0x7f1234567abc /opt/tritonserver/backends/tensorrtllm/libtriton_tensorrtllm.so(+0x1234)"""


def test_an_engines_error_does_not_reveal_internals(capfd: pytest.CaptureFixture[str]) -> None:
    message = BLS.public_message(CPP)
    assert message == (
        "Encountered an error when fetching new request: Assertion failed: beamWidth > 0; see the server's log"
    )
    assert CPP in capfd.readouterr().err
    for message in ("/opt/x/y.so", "[TensorRT-LLM][ERROR]", "0x7f1234567890"):
        assert BLS.public_message(message) == "the engine failed on this request; see the server's log"
    for message in ("Prompt length (300) exceeds maximum input length (256).", "and/or 3/4 of it", "see http://a/b"):
        assert BLS.public_message(message) == message


def read_word_lists(packed: np.ndarray) -> list[list[int]]:
    """Reads one row of a word list as TensorRT-LLM does (convertWordList in utils.cc)."""
    ids, offsets = packed.tolist()
    ends = offsets[: offsets.index(-1)] if -1 in offsets else offsets
    assert all(offset == -1 for offset in offsets[len(ends) :])
    assert ends == sorted(set(ends))
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(st.lists(st.lists(st.lists(st.integers(0, 50), max_size=5), max_size=5), min_size=1, max_size=4))
def test_word_lists_are_read_back(rows: list[list[list[int]]]) -> None:
    packed = PREPROCESSING.word_lists(rows)
    assert packed.dtype == np.int32
    assert [read_word_lists(row) for row in packed] == [[word for word in words if word] for words in rows]


def byte_fallback() -> Tokenizer:
    """A tokenizer like those of Llama 2 and Mistral: spaces as U+2581, unknown characters as single bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁the", "▁▁", "�", "é"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


KINDS = {"byte-level": TINY, "byte-fallback": byte_fallback()}


@functools.cache
def read_tokenizer(kind: str, skip: bool) -> tuple[Any, set[int], list[int]]:
    """What tensorrt_llm_bls keeps of a tokenizer."""
    tokenizer = KINDS[kind]
    return BLS.Vocabulary(tokenizer, skip), BLS.incomplete_ids(tokenizer, skip), BLS.context_ids(tokenizer)


@settings(max_examples=300)
@given(kind=st.sampled_from(sorted(KINDS)), skip=st.booleans(), data=st.data())
def test_chunks_add_up_to_the_whole_text(kind: str, skip: bool, data: st.DataObject) -> None:
    """Random ids produce invalid UTF-8, special tokens in the middle and characters that are never completed."""
    tokenizer = KINDS[kind]
    highest = tokenizer.get_vocab_size() - 1
    token = st.integers(0, highest) | st.integers(max(0, highest - 9), highest) | st.integers(94, 260)
    chunks = data.draw(st.lists(st.lists(token, max_size=4), max_size=12))
    vocabulary, incomplete, context = read_tokenizer(kind, skip)
    detokenizer = BLS.Detokenizer(vocabulary, incomplete, context)
    texts = [detokenizer.add(list(chunk)) for chunk in chunks]
    ids = [id for chunk in chunks for id in chunk]
    whole = vocabulary.text_after(context, ids)
    assert "".join(texts) + detokenizer.rest() == whole
