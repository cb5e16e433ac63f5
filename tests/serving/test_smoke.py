"""The smoke test against real servers: one that is right, and ones with a fault each of which must be found."""

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
from builder.serving.server import Server, serve
from builder.triton import repository
from builder.trtllm import flags as trtllm_flags

SNAPSHOT = exports.MODELS["qwen3"]
QUIET = Output("quiet")
BUILD = {"max_batch_size": 4, "max_input_len": 256, "max_seq_len": 384, "max_num_tokens": 512}

# An engine that makes 8 tokens at least, whatever it is asked, knows no stop words, and once sleeps.
CARELESS_ENGINE = """
import time
from dataclasses import replace
from builder.reference import backend

read = backend.read

def careless(*args, **kwargs):
    wishes = read(*args, **kwargs)
    if wishes[0].max_tokens == 77:
        time.sleep(4)
    return [replace(wish, max_tokens=max(wish.max_tokens, 8), stop_words=()) for wish in wishes]

backend.read = careless
TritonPythonModel = backend.TritonPythonModel
"""
# NVIDIA's own template detokenizes every piece by itself.
STATELESS = """
Detokenizer.add = lambda self, ids: self.tokenizer.decode(ids, skip_special_tokens=True)
Detokenizer.rest = lambda self: ""
"""
LOSES_THE_THIRD_PIECE = """
_add = Detokenizer.add
def add(self, ids):
    self.count = getattr(self, "count", 0) + 1
    new = _add(self, ids)
    return "" if self.count == 3 else new
Detokenizer.add = add
"""
TELLS_TOO_MUCH = """
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
    facts = repository.write(root / "models", engine, snapshot, schema.Repository(bls_instances=4))
    return root / "models", facts


@pytest.fixture(scope="module")
def served(rendered: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(rendered[0], out=QUIET, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture
def client(served: Server, rendered: tuple[Path, dict[str, Any]]) -> Client:
    return Client(served.http_url, served.grpc_url, rendered[1]["models"], timeout=60)


def changed(rendered: tuple[Path, dict[str, Any]], tmp_path: Path, changes: dict[str, str]) -> Path:
    """The same repository with code added at the end of models."""
    models = tmp_path / "models"
    shutil.copytree(rendered[0], models)
    for model, code in changes.items():
        with open(models / model / "1" / "model.py", "a", encoding="utf-8") as file:
            file.write(code)
    return models


@contextmanager
def broken(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path, changes: dict[str, str], engine: str
) -> Iterator[Server]:
    """A server of the changed repository, with another engine."""
    models = changed(rendered, tmp_path, changes)
    backend = tmp_path / "engine.py"
    backend.write_text(engine, encoding="utf-8")
    with serve(models, out=QUIET, log=tmp_path / "server.log", engine_backend=backend) as server:
        yield server


def failed(report: smoke.SmokeReport) -> set[str]:
    return {check.name for check in report.failed}


# ---- the right server


def test_a_right_repository_passes(served: Server, rendered: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
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


def test_a_refusal_is_of_the_client(client: Client) -> None:
    for way in (client.http_infer, client.http_generate, client.grpc_infer, client.grpc_stream):
        with pytest.raises(ServerError, match="max_tokens is 0"):
            way(Request("A list is", 0))


# ---- the reference executor under Triton


def stream(server: Server, requests: Sequence[tuple[str, dict[str, Any]]], cancel_after: int = 0) -> list[Any]:
    """Responses of the engine as they come: (request id, final, tokens), or an error's text."""
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


def wanted(prompt: Sequence[int], tokens: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": [prompt], "input_lengths": [[len(prompt)]], "request_output_len": [[tokens]], **more}


def test_streams_interleave_and_the_last_token_is_final(served: Server) -> None:
    streaming = {"streaming": [[True]]}
    got = stream(served, [("a", wanted([5, 6], 12, **streaming)), ("b", wanted([7], 12, **streaming))])
    finals = {name: [final for one, final, _ in got if one == name] for name in "ab"}
    assert finals == {name: [False] * 11 + [True] for name in "ab"}
    assert all(len(ids) == 1 for _, _, ids in got)
    order = "".join(name for name, _, _ in got)
    assert order.index("b") < order.rindex("a")
    for name, prompt in (("a", [5, 6]), ("b", [7])):
        whole = stream(served, [("w", wanted(prompt, 12))])
        assert whole == [("w", True, [ids[0] for one, _, ids in got if one == name])]


def test_rows_of_one_request_are_answered_each(served: Server) -> None:
    rows = {"input_ids": [[5, 6], [7, 0]], "input_lengths": [[2], [1]], "request_output_len": [[3], [2]]}
    got = stream(served, [("rows", rows)])
    alone = [stream(served, [("x", wanted([5, 6], 3))])[0][2], stream(served, [("x", wanted([7], 2))])[0][2]]
    assert sorted(ids for _, _, ids in got) == sorted(alone)
    assert [final for _, final, _ in got] == [False, True]


def test_stop_ends_the_request_with_its_id(served: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, served, [("stop me", wanted([5], 300, streaming=[[True]]))])
        time.sleep(0.5)
        assert stream(served, [("stop me", wanted([5], 1, stop=[[True]]))]) == [("stop me", True, None)]
        got = running.result(60)
    assert got[-1] == ("stop me", True, [])
    assert len(got) < 300


def test_a_client_that_leaves_frees_its_place(served: Server) -> None:
    many = [(str(n), wanted([n + 1], 380, streaming=[[True]])) for n in range(BUILD["max_batch_size"])]
    stream(served, many, cancel_after=len(many))
    start = time.monotonic()
    assert stream(served, [("next", wanted([9], 2))])[0][1]
    assert time.monotonic() - start < 5, "it did not wait for the ends of the abandoned"


def test_a_wrong_request_harms_no_neighbour(served: Server) -> None:
    alone = stream(served, [("good", wanted([5, 6], 4))])
    got = stream(
        served,
        [
            ("bad", wanted([5], 4, beam_width=[[2]])),
            ("good", wanted([5, 6], 4)),
            ("long", wanted([5] * 300, 4)),
            ("strange", wanted([99999], 4)),
        ],
    )
    assert alone[0] in got
    errors = " ".join(one for one in got if isinstance(one, str))
    assert "reference executor does no beam search" in errors
    assert "Prompt length (300) exceeds maximum input length (256)" in errors
    assert "input_ids must be within" in errors


# ---- servers with a fault


def test_an_engine_that_ignores_its_limits_and_a_stateless_detokenizer_are_found(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with broken(rendered, tmp_path, {"tensorrt_llm_bls": STATELESS}, CARELESS_ENGINE) as server:
        report = smoke.smoke(server.http_url, server.grpc_url, rendered[1], out=QUIET, timeout=60)
        impatient = Client(server.http_url, server.grpc_url, rendered[1]["models"], timeout=1)
        with pytest.raises(ResponseTimeout, match="no chunk arrived"):
            impatient.grpc_stream(Request("A list is", 77))
    assert failed(report) == {
        "the engine makes max_tokens tokens",
        "max_tokens ends the answer",
        "a stop word ends the answer",
        "streamed UTF-8 is never cut",
    }


def test_a_lost_piece_and_an_error_that_tells_too_much_are_found_and_leave_no_stage(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    changed(rendered, tmp_path, {"tensorrt_llm_bls": LOSES_THE_THIRD_PIECE, "preprocessing": TELLS_TOO_MUCH})
    store = Store(tmp_path / "store", QUIET)
    with pytest.raises(smoke.SmokeFailed, match="streamed pieces are the whole answer") as raised:
        smoke.smoke_test(repository.Repository(tmp_path, "digest", rendered[1]), store=store)
    assert raised.value.exit_code == 5
    found = failed(raised.value.report)
    assert {"streamed pieces are the whole answer", "the same answer every way", "invalid UTF-8"} <= found
    assert "HTTP infer" not in found
    assert not list((tmp_path / "store").glob("smoke/*/*"))


def test_a_server_that_is_not_there_fails_at_once(rendered: tuple[Path, dict[str, Any]]) -> None:
    start = time.monotonic()
    report = smoke.smoke("127.0.0.1:1", "127.0.0.1:1", rendered[1], out=QUIET, timeout=2)
    assert [check.name for check in report.failed] == ["server and models ready"]
    assert time.monotonic() - start < 10


# ---- the report


def test_junit_names_every_check(tmp_path: Path) -> None:
    report = smoke.SmokeReport(
        (
            smoke.Check("good", True, "seen", 0.5),
            smoke.Check("bad", False, "it said <é> \x00\ufffd", 1.25),
            smoke.Check("no occasion", None, "no prompt drew it", 0.0),
        )
    )
    smoke.write_junit(report, tmp_path / "new" / "junit.xml")
    suite = ElementTree.parse(tmp_path / "new" / "junit.xml").getroot()
    counts = {"tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    assert suite.attrib == {"name": "smoke", "time": "1.750", **counts}
    good, bad, unchecked = suite.findall("testcase")
    assert unchecked.find("skipped").attrib["message"] == "no prompt drew it"
    assert unchecked.find("failure") is None
    assert good.find("failure") is None
    assert bad.find("failure").attrib["message"] == r"it said <é> \x00" + "\ufffd"


def test_a_report_without_failures_raises_nothing() -> None:
    smoke.SmokeReport((smoke.Check("good", True, "", 0.0),)).check()
