"""The llmapi repository on a real Triton server, with a stand-in for TensorRT-LLM's LLM class (llmapi_stand_in.py)."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import yaml
from google.protobuf import text_format
from llmapi_stand_in import SAY, put_stand_in, render_with_stand_in
from tokenizers import Tokenizer
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from builder import pipeline
from builder.checkpoint import huggingface, layouts
from builder.clean import removal
from builder.clean.reachability import Request
from builder.core.errors import IntegrityError, ServingError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store, verify
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.publish import build_record
from builder.recipe import schema
from builder.serving import smoke
from builder.serving.server import Server, serve
from builder.triton.combined import Member, combine, fraction_of
from builder.triton.repository import open_repository
from builder.trtllm import compatibility

SNAPSHOT = Path(__file__).parents[1] / "data" / "tiny-qwen3"
QUIET = Output("quiet")
LIMITS = {"engine.max_input_len": 128, "engine.max_seq_len": 256, "engine.max_batch_size": 8}
CONFIG = json.loads((SNAPSHOT / "config.json").read_text())


def resolved(**more: Any) -> schema.Resolved:
    return schema.resolve({"model.id": str(SNAPSHOT), "gpu": "sm100", "target": "llmapi", **LIMITS, **more})


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model's checkpoint in both layouts; the path of the Hugging Face one."""
    root = tmp_path_factory.mktemp("checkpoint")
    exports.export(exports.quantized(SNAPSHOT), root / "unified")
    huggingface.complete(root / "unified", SNAPSHOT)
    layouts.write_tensorrt_llm(root / "unified", CONFIG, root / "tensorrt_llm")
    return root / "unified"


def write(models: Path, unified: Path, **more: Any) -> dict[str, Any]:
    asked = resolved(**more)
    return llmapi_repository.write(models, unified, SNAPSHOT, llmapi_arguments.resolve(asked, CONFIG), asked)


@pytest.fixture(scope="module")
def rendered(unified: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    models = tmp_path_factory.mktemp("rendered") / "models"
    facts = write(models, unified)
    put_stand_in(models)
    return models, facts


@pytest.fixture(scope="module")
def server(rendered: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(rendered[0], out=QUIET, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


# ---- what is rendered


def test_the_yaml_holds_the_arguments_and_the_config_says_the_same(unified: Path, tmp_path: Path) -> None:
    facts = write(tmp_path / "models", unified)
    content = yaml.safe_load((tmp_path / "models/tensorrt_llm/1/model.yaml").read_text())
    assert content.pop("model") == os.path.relpath(unified, tmp_path / "models/tensorrt_llm")
    assert content.pop("backend") == "pytorch"
    own = {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100}
    assert content.pop("triton_config") == own
    assert {row["name"]: row["value"] for row in facts["parameters"]} == {
        name: str(value).lower() for name, value in own.items()
    }
    assert content == llmapi_arguments.tree(llmapi_arguments.resolve(resolved(), CONFIG))
    text = (tmp_path / "models/tensorrt_llm/config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("python", 0, True)
    assert {i.name for i in config.input} >= {"text_input", "streaming", *facts["names"].values()}
    assert facts["models"] == {"generate": "tensorrt_llm", "stream": "tensorrt_llm"}
    compatibility.check(tmp_path / "models", compatibility.Runtime(tensorrt_llm="1.2.1"))
    with pytest.raises(IntegrityError, match=r"rendered for TensorRT-LLM 1\.2\.1, and this machine has 1\.3\.0rc25"):
        compatibility.check(tmp_path / "models", compatibility.Runtime(tensorrt_llm="1.3.0rc25"))


def test_without_streaming_it_takes_infer(unified: Path, tmp_path: Path) -> None:
    facts = write(tmp_path / "models", unified, **{"repository.decoupled": False})
    assert facts["models"] == {"generate": "tensorrt_llm", "infer": "tensorrt_llm"}
    put_stand_in(tmp_path / "models")
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        report = smoke.smoke(server.http_url, server.grpc_url, facts, out=QUIET, timeout=120)
        report.check()
        status, text = post(server, {"text_input": "A list is", "streaming": True})
        assert (status, "decoupled: true" in text) == (400, True)
    assert {"HTTP infer", "gRPC infer"} <= {check.name for check in report.checks}


def test_a_checkpoint_that_says_otherwise_is_refused(unified: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"KV cache is in FP8, and kv_cache_config\.dtype is auto"):
        write(tmp_path / "models", unified, **{"quantization.kv_cache_dtype": "auto"})


def test_a_share_of_the_memory_beside_other_models(unified: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", QUIET)
    made = store.stage("repository", {}, lambda directory: write(directory / "models", unified))
    member = Member(open_repository(made.path), "a", 0.4)
    models = combine({"a": member}, store=store).models
    content = yaml.safe_load((models / "a_tensorrt_llm/1/model.yaml").read_text())
    assert content["kv_cache_config"]["free_gpu_memory_fraction"] == 0.4
    assert (models / "a_tensorrt_llm" / content["model"]).resolve() == unified.resolve()
    own = schema.Repository().kv_cache_free_gpu_mem_fraction
    assert [fraction_of(one) for one in (member, replace(member, fraction=None))] == [0.4, own]


def test_defaults_that_the_sampler_would_ignore_are_refused(unified: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sampling_defaults\.presence_penalty would be ignored by the sampler of"):
        write(tmp_path / "models", unified, **{"repository.sampling_defaults.presence_penalty": 0.5})
    facts = write(tmp_path / "models", unified, **{"repository.sampling_defaults.presence_penalty": 0})
    assert facts["sampling_defaults"] == {}


def test_text_settings_of_the_recipe(unified: Path, tmp_path: Path) -> None:
    """top_k 1 as default makes the stand-in answer requests with top_p, which it rejects otherwise."""
    more = {"sampling_defaults.top_k": 1, "parse_special_tokens": "never", "add_special_tokens": False}
    facts = write(tmp_path / "models", unified, **{f"repository.{name}": value for name, value in more.items()})
    assert facts["sampling_defaults"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
    put_stand_in(tmp_path / "models")
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        tokenizer = Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        long = "<|im_end|>" * 100  # 100 tokens if they are parsed
        status, text = post(server, {"text_input": long, "sampling_param_max_tokens": 4})
        assert (status, f"has {len(tokenizer.encode(long).ids)} tokens" in text) == (400, True)
        body = {"text_input": "A list is", "sampling_param_max_tokens": 4}
        assert post(server, body)[0] == 200
        status, text = post(server, {**body, "sampling_param_top_k": 2})
        assert (status, "the stand-in is greedy" in text) == (400, True)


def test_a_full_queue_and_a_stuck_stream_are_unavailable(unified: Path, tmp_path: Path) -> None:
    """Of four requests one runs and one waits. Each gets one token of the stand-in, and then nothing."""
    limits = {"max_queue_size": 1, "queue_timeout_seconds": 1, "stall_timeout_seconds": 1}
    more = {f"repository.{name}": value for name, value in limits.items()}
    write(tmp_path / "models", unified, **more, **{"engine.max_batch_size": 1})
    put_stand_in(tmp_path / "models", "Stuck")
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        body = {"text_input": "A list is", "sampling_param_max_tokens": 9, "streaming": True}
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.append(post(server, body, "generate_stream")[1])) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    full = sum("Exceeds maximum queue size" in text for text in found)
    stuck = sum("the engine sent nothing for 1 seconds" in text for text in found)
    assert (full, stuck) == (2, 2), found


# ---- what is served


def post(server: Server, body: Any, verb: str = "generate") -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://{server.http_url}/v2/models/tensorrt_llm/{verb}"
    request = urllib.request.Request(url, data, {"Connection": "close", "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def generate(server: Server, text: str, tokens: int, **more: Any) -> dict[str, Any]:
    body = {"text_input": text, "sampling_param_max_tokens": tokens, "sampling_param_top_k": 1, **more}
    status, answer = post(server, body)
    assert status == 200, answer
    found: dict[str, Any] = json.loads(answer)
    return found


def inputs(**values: Any) -> list[grpcclient.InferInput]:
    kinds = {bool: ("BOOL", bool), str: ("BYTES", object), int: ("INT32", np.int32)}
    made = []
    for name, value in values.items():
        kind, dtype = kinds[type(value)]
        array = np.array([value.encode() if isinstance(value, str) else value], dtype=dtype)
        made.append(grpcclient.InferInput(name, array.shape, kind))
        made[-1].set_data_from_numpy(array)
    return made


def test_the_smoke_test_is_green(server: Server, rendered: tuple[Path, dict[str, Any]]) -> None:
    report = smoke.smoke(server.http_url, server.grpc_url, rendered[1], out=QUIET, timeout=120)
    report.check()
    names = {check.name for check in report.checks}
    assert {"HTTP generate", "gRPC stream", "a stop word ends the answer", "too long prompt"} <= names
    assert not {"HTTP infer", "gRPC infer"} & names
    assert report.sample is not None


def test_the_llm_got_the_arguments_of_the_yaml(server: Server) -> None:
    [said] = re.findall(r"stand-in for TensorRT-LLM: (\{.*\})", server.log.read_text())
    assert json.loads(said) == {
        "backend": "pytorch",
        **llmapi_arguments.tree(llmapi_arguments.resolve(resolved(), CONFIG)),
    }


def test_outputs_that_are_asked_for_come_in_their_types(server: Server) -> None:
    asked = {f"return_{name}": True for name in ("finish_reason", "stop_reason", "cumulative_logprob")}
    answer = generate(server, "A list is", 4, sampling_param_min_tokens=4, **asked)
    assert (answer["finish_reason"], answer["stop_reason"]) == ("length", "None")
    assert -100 < answer["cumulative_logprob"] < 0
    assert "finish_reason" not in generate(server, "A list is", 4)


def test_penalties_without_effect_are_taken_and_others_where_they_are_heeded(server: Server, unified: Path) -> None:
    neutral = {"sampling_param_repetition_penalty": 1.0, "sampling_param_presence_penalty": 0.0}
    assert generate(server, "A list is", 4, **neutral) == generate(server, "A list is", 4)
    for version, penalties in (("1.2.1", "false"), ("1.3.0rc25", "true")):
        models = unified.parent / version / "models"
        write(models, unified, **{"engine.tensorrt_llm": version})
        assert (
            f'key: "penalties" value: {{ string_value: "{penalties}" }}'
            in (models / "tensorrt_llm" / "config.pbtxt").read_text()
        )


def test_the_prompt_is_left_out_unless_asked_for(server: Server) -> None:
    alone = generate(server, "A list is", 4)["text_output"]
    both = generate(server, "A list is", 4, sampling_param_exclude_input_from_output=False)["text_output"]
    assert both == f"A list is{alone}"


def test_http_streams_pieces(server: Server) -> None:
    body = {"text_input": "A list is", "sampling_param_max_tokens": 12, "sampling_param_min_tokens": 12,
            "sampling_param_top_k": 1, "streaming": True}  # fmt: skip
    status, text = post(server, body, "generate_stream")
    assert status == 200
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in text.splitlines() if line]
    assert len(pieces) > 1
    assert "".join(pieces) == generate(server, "A list is", 12, sampling_param_min_tokens=12)["text_output"]


def test_a_character_of_several_tokens_comes_whole(server: Server) -> None:
    said = "ȸ 🎉 ȹ"
    tokens = len(Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json")).encode(said).ids)
    assert tokens > len(said)
    body = {"text_input": SAY + said, "sampling_param_max_tokens": tokens, "sampling_param_top_k": 1, "streaming": True}
    _, text = post(server, body, "generate_stream")
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in text.splitlines() if line]
    assert "".join(pieces) == said
    assert len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    _, text = post(server, {**body, "sampling_param_max_tokens": 1}, "generate_stream")
    assert json.loads(text.strip().removeprefix("data: "))["text_output"] == "\ufffd"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": "word " * 200}, "this model takes 128 (max_input_len)"),
        ({"text_input": "A list is", "sampling_param_max_tokens": 300}, "max_tokens can be"),
        ({"text_input": "A list is", "sampling_param_max_tokens": 0}, "must be 1 or more"),
        ({"text_input": ""}, "text_input is empty"),
        ({"text_input": ["a", "b"]}, "one prompt per request"),
        ({"text_input": "A", "sampling_param_temperature": -1.0}, "require temperature >= 0"),
        ({"text_input": "A", "sampling_param_top_p": 0.5}, "the stand-in is greedy"),
        ({"text_input": "A", "sampling_param_repetition_penalty": 1.2}, "repetition_penalty would be ignored"),
        ({"text_input": "A", "lora_name": "one"}, "lora_name is one; this model has no adapters"),
        ({"text_input": "A", "stop": True}, "stop needs the id"),
        (b'{"text_input": "caf\xe9"}', "not valid UTF-8 at byte 3"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(server: Server, body: Any, message: str) -> None:
    _, text = post(server, body)
    assert message in json.loads(text)["error"]
    assert "Traceback" not in text


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    asked = inputs(text_input="A list is", sampling_param_max_tokens=240, sampling_param_min_tokens=240, streaming=True)
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer("tensorrt_llm", asked)
        answers.get(timeout=120)
        client.stop_stream(cancel_requests=True)
    assert seen(server, r"aborted after \d+ of 240 tokens")
    assert generate(server, "A list is", 4)["text_output"]


def test_stop_ends_the_requests_of_its_id(server: Server) -> None:
    asked = inputs(text_input="A list is", sampling_param_max_tokens=230, sampling_param_min_tokens=230, streaming=True)
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer("tensorrt_llm", asked, request_id="mine")
        answers.get(timeout=120)
        client.async_stream_infer("tensorrt_llm", inputs(text_input="", stop=True), request_id="mine")
        ends = []
        while len(ends) < 2:
            answer = answers.get(timeout=120)
            ends += [answer] if isinstance(answer, InferenceServerException) else []
        client.stop_stream()
    assert all("cancelled" in str(end) for end in ends)
    assert seen(server, r"aborted after \d+ of 230 tokens")


def seen(server: Server, pattern: str) -> bool:
    """Whether the log comes to hold it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if re.search(pattern, server.log.read_text()):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("right", "wrong", "checks"),
    [
        (
            "sent = text",
            "sent = ''",
            {"streamed chunks make up the whole answer", "all endpoints give the same answer"},
        ),
        ('f"the prompt has {len(ids)} tokens', '__file__ + f"', {"too long prompt"}),
    ],
)
def test_a_model_with_a_fault_is_found(
    rendered: tuple[Path, dict[str, Any]], tmp_path: Path, right: str, wrong: str, checks: set[str]
) -> None:
    """All text so far in each piece, as upstream's model streams; an error with a path in it."""
    shutil.copytree(rendered[0], tmp_path / "models")
    file = tmp_path / "models/tensorrt_llm/1/model.py"
    code = file.read_text()
    assert right in code
    file.write_text(code.replace(right, wrong))
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        report = smoke.smoke(server.http_url, server.grpc_url, rendered[1], out=QUIET, timeout=120)
    assert checks <= {check.name for check in report.failed}


def test_arguments_that_the_llm_refuses_are_in_the_error(unified: Path, tmp_path: Path) -> None:
    write(tmp_path / "models", unified)
    put_stand_in(tmp_path / "models")
    file = tmp_path / "models/tensorrt_llm/1/model.yaml"
    file.write_text(file.read_text() + "max_batchsize: 3\n")
    with (
        pytest.raises(ServingError, match="before it was ready") as caught,
        serve(tmp_path / "models", out=QUIET, log=tmp_path / "log"),
    ):
        pass
    assert "invalid argument: max_batchsize" in caught.value.why


# ---- the whole chain


@pytest.fixture
def small() -> dict[str, Any]:
    return {"calibration.data": "builtin:python-docs", "calibration.samples": 4, "calibration.seq_len": 64}


@pytest.mark.slow
def test_one_build_leaves_a_tested_repository(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages with the real parts; the stand-in is put beside the rendered model."""
    asked = resolved(**small)
    store = Store(tmp_path / "out", Output("human"))
    with pytest.raises(UnsupportedError, match="not installed on this machine"):
        pipeline.build(asked, store)
    assert not (tmp_path / "out" / "snapshot").exists()
    with pytest.raises(UsageError, match="has no engine"):
        pipeline.build(asked, store, until="engine")

    render_with_stand_in(monkeypatch)
    monkeypatch.setattr(llmapi_arguments, "check_machine", lambda resolved: None)
    built = pipeline.build(asked, store)
    chain = ["snapshot", "calibration", "checkpoint", "quality", "repository", "smoke", "verdict"]
    assert [done.stage for done in store.done] == chain
    assert built.smoke is not None
    built.smoke.check()
    assert built.link is not None
    assert built.link.name == "tiny-qwen3-sm100-nvfp4-llmapi"
    found = build_record.find(store.root, built.link.resolve())
    assert found is not None
    assert {setting["name"] for setting in found["flags"]} >= {"kv_cache_config.dtype", "max_batch_size"}
    assert "target=llmapi" in found["command"]
    again = Store(tmp_path / "out", QUIET)
    pipeline.build(asked, again)
    assert all(done.cached for done in again.done)
    assert not any(verify(again.root, QUIET).values())
    removed = [entry.path for entry in removal.plan(again.root, Request(older_than=0)).remove]
    assert not [path for path in removed if path.parent.name not in ("logs", "locks")]
    other = Store(tmp_path / "out", QUIET)
    pipeline.build(resolved(**small, **{"repository.kv_cache_free_gpu_mem_fraction": 0.5}), other, until="repository")
    made = [done.stage for done in other.done if not done.cached]
    assert made == ["repository", "verdict"]
