"""The smoke test on real servers: a correct one passes, and each fault of the others is found."""

from __future__ import annotations

import json
import queue
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import exports
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from builder.checkpoint import layouts
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.serving import smoke
from builder.serving.client import Client, Request, ResponseTimeout, ServerError
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from builder.trtllm import flags as trtllm_flags

SNAPSHOT = exports.MODELS["qwen3"]
QUIET = Output("quiet")
BUILD = {"max_batch_size": 4, "max_input_len": 256, "max_seq_len": 384, "max_num_tokens": 512}

# An engine that generates at least 8 tokens, ignores stop words, and sleeps before one particular answer.
CARELESS_ENGINE = """
import time
from dataclasses import replace
from builder.reference import backend

read = backend.read

def careless(*args, **kwargs):
    requests = read(*args, **kwargs)
    if requests[0].max_tokens == 77:
        time.sleep(4)
    return [replace(request, max_tokens=max(request.max_tokens, 8), stop_words=()) for request in requests]

backend.read = careless
TritonPythonModel = backend.TritonPythonModel
"""
# NVIDIA's own template decodes each chunk separately.
STATELESS = """
Detokenizer.add = lambda self, ids: self.vocabulary.text(ids)
Detokenizer.rest = lambda self: ""
"""
DROPS_THE_THIRD_CHUNK = """
_add = Detokenizer.add
def add(self, ids):
    self.count = getattr(self, "count", 0) + 1
    new = _add(self, ids)
    return "" if self.count == 3 else new
Detokenizer.add = add
"""
LEAKS_A_TRACEBACK = """
import traceback
_text = text
def text(value, name):
    try:
        return _text(value, name)
    except ValueError:
        raise ValueError(traceback.format_exc()) from None
"""


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The fixture model's repository, as a build renders it, and its facts."""
    return render(tmp_path_factory.mktemp("served"), SNAPSHOT)


def render(root: Path, snapshot: Path, **limits: int) -> tuple[Path, dict[str, Any]]:
    exports.export(exports.quantized(snapshot), root / "unified")
    return render_checkpoint(root, snapshot, root / "unified", **limits)


def render_checkpoint(root: Path, snapshot: Path, unified: Path, **limits: int) -> tuple[Path, dict[str, Any]]:
    engine = root / "engine"
    layouts.write_tensorrt_llm(unified, layouts.read_json(snapshot / "config.json"), engine)
    version = trtllm_flags.load("1.2.1")
    pretrained = layouts.read_json(engine / "config.json")
    flags = [trtllm_flags.Flag(name, str(value), "", "") for name, value in (BUILD | limits).items()]
    flags += [
        trtllm_flags.Flag("context_fmha", "disable", "", ""),
        trtllm_flags.Flag("use_paged_context_fmha", "disable", "", ""),
    ]
    config = {
        "version": "1.2.1",
        "pretrained_config": pretrained,
        "build_config": trtllm_flags.build_config(version, flags, pretrained),
    }
    (engine / "config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = repository.write(root / "models", engine, snapshot, schema.Repository())
    return root / "models", facts


@pytest.fixture(scope="module")
def served(rendered: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(rendered[0], out=QUIET, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture
def client(served: Server, rendered: tuple[Path, dict[str, Any]]) -> Client:
    return Client(served.http_url, served.grpc_url, rendered[1]["models"], timeout=60)


def changed(rendered: tuple[Path, dict[str, Any]], tmp_path: Path, changes: dict[str, str]) -> Path:
    """A copy of the repository with code appended to the model.py of some models."""
    models = tmp_path / "models"
    shutil.copytree(rendered[0], models)
    (tmp_path / "engine").symlink_to(rendered[0].parent / "engine")  # which the repository refers to by a relative path
    for model, code in changes.items():
        with open(models / model / "1" / "model.py", "a", encoding="utf-8") as file:
            file.write(code)
    return models


@contextmanager
def broken(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path, changes: dict[str, str], engine: str
) -> Iterator[Server]:
    """A server of the changed repository, with another engine backend."""
    models = changed(rendered, tmp_path, changes)
    backend = tmp_path / "engine.py"
    backend.write_text(engine, encoding="utf-8")
    with serve(models, out=QUIET, log=tmp_path / "server.log", options=ServerOptions(engine_backend=backend)) as server:
        yield server


def failed(report: smoke.SmokeReport) -> set[str]:
    return {check.name for check in report.failed}


# ---- a correct server


def test_a_correct_repository_passes(served: Server, rendered: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    report = smoke.smoke(served.http_url, served.grpc_url, rendered[1], out=QUIET, timeout=60)
    report.check()
    names = [check.name for check in report.checks]
    assert names[:5] == ["server and models ready", "HTTP infer", "HTTP generate", "gRPC infer", "gRPC stream"]
    assert len(names) == 16
    assert report.sample
    assert report.sample.answer
    assert smoke.SmokeReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    utf8 = next(check for check in report.checks if "UTF-8 is never cut" in check.name)
    assert "'ȸȸȸȸ'" in utf8.detail, "characters of two tokens each"


def test_every_endpoint_reports_a_rejected_request(client: Client) -> None:
    for endpoint in (client.http_infer, client.http_generate, client.grpc_infer, client.grpc_stream):
        with pytest.raises(ServerError, match="max_tokens is 0"):
            endpoint(Request("A list is", 0))


# ---- the reference executor under Triton


def stream(server: Server, requests: Sequence[tuple[str, dict[str, Any]]], cancel_after: int = 0) -> list[Any]:
    """The engine's responses as they arrive: (request id, final, token ids), or an error's text."""
    kinds = {"streaming": ("BOOL", bool), "stop": ("BOOL", bool), "return_log_probs": ("BOOL", bool)}
    answers: queue.Queue[Any] = queue.Queue()
    grpc = triton_grpc.InferenceServerClient(server.grpc_url)
    grpc.start_stream(lambda result, error: answers.put((result, error)))
    for request_id, values in requests:
        tensors = []
        for name, value in values.items():
            kind, dtype = kinds.get(name, ("INT32", np.int32))
            array = np.array(value, dtype)
            tensors.append(triton_grpc.InferInput(name, list(array.shape), kind))
            tensors[-1].set_data_from_numpy(array)
        grpc.async_stream_infer("tensorrt_llm", tensors, request_id=request_id, enable_empty_final_response=True)
    got: list[Any] = []
    ended = 0
    while ended < len(requests) and not (cancel_after and len(got) >= cancel_after):
        result, error = answers.get(timeout=60)
        if error is not None:
            got.append(error.message())
            ended += 1
            continue
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        ids = result.as_numpy("output_ids")
        got.append((response.id, final, None if ids is None else ids.reshape(-1).tolist()))
        ended += final
    grpc.stop_stream(cancel_requests=ended < len(requests))
    grpc.close()
    return got


def request(prompt: Sequence[int], tokens: int, **inputs: Any) -> dict[str, Any]:
    return {"input_ids": [prompt], "input_lengths": [[len(prompt)]], "request_output_len": [[tokens]], **inputs}


def test_streams_interleave_and_the_last_response_is_final(served: Server) -> None:
    streaming = {"streaming": [[True]]}
    # The first answer is long: it must not be over before the second request arrives, however busy the machine is.
    tokens = {"a": 100, "b": 12}
    got = stream(served, [(n, request(prompt, tokens[n], **streaming)) for n, prompt in (("a", [5, 6]), ("b", [7]))])
    finals = {name: [final for one, final, _ in got if one == name] for name in "ab"}
    assert finals == {name: [False] * (tokens[name] - 1) + [True] for name in "ab"}
    assert all(len(ids) == 1 for _, _, ids in got)
    order = "".join(name for name, _, _ in got)
    assert order.index("b") < order.rindex("a")
    for name, prompt in (("a", [5, 6]), ("b", [7])):
        whole = stream(served, [("w", request(prompt, tokens[name]))])
        assert whole == [("w", True, [ids[0] for one, _, ids in got if one == name])]


def test_each_row_of_a_request_is_answered(served: Server) -> None:
    rows = {"input_ids": [[5, 6], [7, 0]], "input_lengths": [[2], [1]], "request_output_len": [[3], [2]]}
    got = stream(served, [("rows", rows)])
    alone = [stream(served, [("x", request([5, 6], 3))])[0][2], stream(served, [("x", request([7], 2))])[0][2]]
    assert sorted(ids for _, _, ids in got) == sorted(alone)
    assert [final for _, final, _ in got] == [False, True]


def test_stop_ends_the_request_with_the_same_id(served: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, served, [("stop me", request([5], 300, streaming=[[True]]))])
        time.sleep(0.5)
        assert stream(served, [("stop me", request([5], 1, stop=[[True]]))]) == [("stop me", True, None)]
        got = running.result(60)
    assert got[-1] == ("stop me", True, [])
    assert len(got) < 300


def test_a_cancelled_stream_frees_its_slot(served: Server) -> None:
    many = [(str(n), request([n + 1], 380, streaming=[[True]])) for n in range(BUILD["max_batch_size"])]
    stream(served, many, cancel_after=len(many))
    start = time.monotonic()
    assert stream(served, [("next", request([9], 2))])[0][1]
    assert time.monotonic() - start < 5, "without waiting for the cancelled requests to finish"


def test_an_invalid_request_does_not_affect_concurrent_ones(served: Server) -> None:
    alone = stream(served, [("good", request([5, 6], 4))])
    got = stream(
        served,
        [
            ("bad", request([5], 4, beam_width=[[2]])),
            ("good", request([5, 6], 4)),
            ("long", request([5] * 300, 4)),
            ("strange", request([99999], 4)),
        ],
    )
    assert alone[0] in got
    errors = " ".join(one for one in got if isinstance(one, str))
    assert "reference executor does not support beam search" in errors
    assert "Prompt length (300) exceeds maximum input length (256)" in errors
    assert "input_ids must be within" in errors


# ---- faulty servers


def test_an_engine_that_ignores_its_limits_and_a_stateless_detokenizer_are_found(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with broken(rendered, tmp_path, {"tensorrt_llm_bls": STATELESS}, CARELESS_ENGINE) as server:
        report = smoke.smoke(server.http_url, server.grpc_url, rendered[1], out=QUIET, timeout=60)
        impatient = Client(server.http_url, server.grpc_url, rendered[1]["models"], timeout=1)
        with pytest.raises(ResponseTimeout, match="no chunk arrived"):
            impatient.grpc_stream(Request("A list is", 77))
    assert failed(report) == {
        "the engine generates max_tokens tokens",
        "max_tokens ends the answer",
        "a stop word ends the answer",
        "streamed UTF-8 is never cut",
    }


def test_a_dropped_chunk_and_a_leaked_traceback_are_found_and_nothing_is_cached(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    changed(rendered, tmp_path, {"tensorrt_llm_bls": DROPS_THE_THIRD_CHUNK, "preprocessing": LEAKS_A_TRACEBACK})
    store = Store(tmp_path / "store", QUIET)
    with pytest.raises(smoke.SmokeFailed, match="streamed chunks make up the whole answer") as raised:
        smoke.smoke_test(repository.Repository(tmp_path, "digest", rendered[1]), store=store)
    assert raised.value.exit_code == 5
    found = failed(raised.value.report)
    assert {"streamed chunks make up the whole answer", "all endpoints give the same answer", "invalid UTF-8"} <= found
    assert "HTTP infer" not in found
    assert not list((tmp_path / "store").glob("smoke/*/*"))


def test_a_server_that_does_not_run_fails_quickly(rendered: tuple[Path, dict[str, Any]]) -> None:
    start = time.monotonic()
    report = smoke.smoke("127.0.0.1:1", "127.0.0.1:1", rendered[1], out=QUIET, timeout=2)
    assert [check.name for check in report.failed] == ["server and models ready"]
    assert time.monotonic() - start < 10


# ---- the report


def test_junit_has_every_check(tmp_path: Path) -> None:
    report = smoke.SmokeReport(
        (
            smoke.Check("good", True, "seen", 0.5),
            smoke.Check("bad", False, "it said <é> \x00\ufffd", 1.25),
            smoke.Check("not possible", None, "no prompt elicited it", 0.0),
        )
    )
    smoke.write_junit(report, tmp_path / "new" / "junit.xml")
    suite = ElementTree.parse(tmp_path / "new" / "junit.xml").getroot()
    counts = {"tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    assert suite.attrib == {"name": "smoke", "time": "1.750", **counts}
    good, bad, unchecked = suite.findall("testcase")
    assert unchecked.find("skipped").attrib["message"] == "no prompt elicited it"
    assert unchecked.find("failure") is None
    assert good.find("failure") is None
    assert bad.find("failure").attrib["message"] == r"it said <é> \x00" + "\ufffd"


def test_a_report_without_failures_raises_nothing() -> None:
    smoke.SmokeReport((smoke.Check("good", True, "", 0.0),)).check()
