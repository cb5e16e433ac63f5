"""Which requests are valid, and how they become the engine's tensors."""

from __future__ import annotations

import json
import shutil
import struct
import time
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from tritonclient.grpc import service_pb2

from builder.core.errors import UnsupportedError
from builder.gateway import requests
from builder.gateway.errors import ApiError
from builder.gateway.fields import IGNORED, REFUSED
from builder.gateway.requests import ChatRequest, CompletionRequest
from builder.gateway.settings import Model
from builder.gateway.tensors import Decoder, Sampling, TokenRequest, encode, encode_stop
from builder.recipe import schema
from builder.triton import repository
from tests.triton.test_repository import SNAPSHOT, write_engine

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    tmp = tmp_path_factory.mktemp("model")
    return Model.read(
        tmp / "models", repository.write(tmp / "models", write_engine(tmp / "engine"), SNAPSHOT, schema.Repository())
    )


def chat(model: Model, **fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return requests.parse(ChatRequest, json.dumps(body).encode(), lambda name: model)


def tensors(message: Any) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        entry.name: (entry.datatype, list(entry.shape), content)
        for entry, content in zip(message.inputs, message.raw_input_contents, strict=True)
    }


def encoded(model: Model, sampling: Sampling | None = None, **options: Any) -> dict[str, tuple[str, list[int], bytes]]:
    request = TokenRequest(
        [5, 6, 7], 9, sampling or Sampling(), options.pop("end_ids", [1, 2]), streaming=True, **options
    )
    return tensors(encode(model, request, "id"))


def test_the_model_of_a_repository(model: Model) -> None:
    assert (model.name, model.llmapi, model.streams) == ("tensorrt_llm", False, True)
    assert (model.max_input_len, model.max_seq_len, model.vocab_size) == (128, 256, 4096)
    assert model.end_ids == (4089, 4087)
    assert model.template is not None


def test_end_ids_that_the_files_do_not_have(tmp_path: Path) -> None:
    """As in fine-tunes that end a turn with a token of their own, and keep the base model's configuration."""
    snapshot = shutil.copytree(SNAPSHOT, tmp_path / "snapshot", ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": 4087, "temperature": 0.25}))
    part = schema.Repository.model_validate({"sampling_defaults": {"from_model": True, "top_k": 7}})
    facts = repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), snapshot, part)
    assert facts["end_ids"] == [4087]
    model = Model.read(tmp_path / "models", facts)
    assert model.end_ids == (4087, 4089)
    explained = model.explained()
    assert explained["end_ids"] == ["4087 <|endoftext|>", "4089 <|im_end|> (ends a turn of the chat template)"]
    assert (explained["tool_calls"], explained["reasoning"]) == ("none", "think")
    found, own = chat(model).sampling(model), chat(model, temperature=1, top_k=0).sampling(model)
    assert (found.temperature, found.top_k, found.top_p) == (0.25, 7, 1.0)
    assert (own.temperature, own.top_k) == (1.0, 0)


def test_a_repository_without_a_tokenizer(tmp_path: Path) -> None:
    facts = {"checkpoint": str(tmp_path), "models": {"generate": "m"}}
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        Model.read(tmp_path, facts)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsNonStreaming),
        (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    ],
)
def test_every_field_of_openais_requests_is_known(kind: Any, theirs: Any) -> None:
    """Supported, ignored or refused by name. A field that a later version of the package adds fails here."""
    names = set(typing.get_type_hints(theirs))
    assert names - set(kind.model_fields) - set(IGNORED) - set(REFUSED) == set()
    assert not set(kind.model_fields) & {*IGNORED, *REFUSED}


@given(body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_request_or_an_error(model: Model, body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        with pytest.raises(ApiError) as raised:
            requests.parse(kind, body, lambda name: model)
        assert raised.value.status == 400
        json.dumps(raised.value.body)


@given(name=st.sampled_from(sorted({*ChatRequest.model_fields} - {"messages", "model"})), value=JSON)
def test_any_value_of_a_field_is_taken_or_named(model: Model, name: str, value: Any) -> None:
    rejected = None
    try:
        found = chat(model, **{name: value})
        encode(model, TokenRequest([5], 9, found.sampling(model), found.end_ids(model), streaming=True), "id")
        requests.template_variables(found)
    except ApiError as error:
        rejected = error
    assert rejected is None or (rejected.status == 400 and (name in rejected.message or "JSON" in rejected.message))


def test_names_as_long_as_the_body_are_named_briefly_and_soon(model: Model) -> None:
    name, start = "m" * (4 << 20), time.process_time()
    for fields in ({name: 1}, {"stream_options": {name: 1}}):
        with pytest.raises(ApiError) as caught:
            chat(model, **fields)
        assert len(caught.value.message) < 400
    assert time.process_time() - start < 1


def test_more_stop_ids_than_an_answer_may_have(model: Model) -> None:
    assert chat(model, stop_token_ids=[1] * requests.MAX_STOP_IDS)
    with pytest.raises(ApiError, match="stop_token_ids: List should have at most 256 items"):
        chat(model, stop_token_ids=[1] * (requests.MAX_STOP_IDS + 1))


@pytest.mark.parametrize("number", [1 << 31, 1 << 63, 10**4200])
def test_numbers_that_an_engine_can_not_take(model: Model, number: int) -> None:
    for name in ("max_tokens", "max_completion_tokens", "min_tokens", "top_k"):
        with pytest.raises(ApiError, match=rf"{name}: Input should be less than or equal to 2147483647"):
            chat(model, **{name: number})
    with pytest.raises(ApiError, match="keys must be token ids below 4096"):
        chat(model, logit_bias={str(number): 1}).sampling(model)
    with pytest.raises(ApiError, match="keys must be token ids below 4096"):
        chat(model, logit_bias={"9" * 5000: 1}).sampling(model)


def test_numbers_that_are_0_in_32_bits(model: Model) -> None:
    """The engine would divide by them, or reject the request."""
    assert chat(model, temperature=1e-300).sampling(model).greedy
    assert chat(model, top_p=1e-300).sampling(model).greedy
    with pytest.raises(ApiError, match="repetition_penalty: Input should be greater"):
        chat(model, repetition_penalty=1e-300)


@pytest.mark.parametrize("name", ["messages", "self", "tools", "today"])
def test_names_that_a_template_gets_from_elsewhere(model: Model, name: str) -> None:
    with pytest.raises(ApiError, match=f"chat_template_kwargs can't set {name}"):
        requests.template_variables(chat(model, chat_template_kwargs={name: 1}))


def test_arguments_of_a_tool_call_that_are_no_json_stay_a_text(model: Model) -> None:
    for text in ("no JSON", "[" * 100_000):
        calls = [{"function": {"name": "f", "arguments": text}}]
        [message] = chat(model, messages=[{"role": "assistant", "tool_calls": calls}]).messages
        assert message.for_template()["tool_calls"][0]["function"]["arguments"] == text


def test_deeply_nested_json(model: Model) -> None:
    with pytest.raises(ApiError, match="not valid JSON"):
        requests.parse(ChatRequest, b"[" * 100_000, lambda name: model)


def test_temperature_alone_samples(model: Model) -> None:
    """The engine is greedy without top_k and top_p, whatever the temperature (see builder/reference/sampling.py)."""
    found = encoded(model, chat(model, temperature=0.7).sampling(model))
    assert struct.unpack("<f", found["runtime_top_p"][2]) == (1.0,)
    assert struct.unpack("<f", found["temperature"][2])[0] == pytest.approx(0.7)
    assert "runtime_top_k" not in found


def test_no_seed_is_a_random_one_and_temperature_0_is_greedy(model: Model) -> None:
    assert chat(model).sampling(model).seed != chat(model).sampling(model).seed
    assert chat(model, seed=-1).sampling(model).seed == (1 << 64) - 1
    found = encoded(model, chat(model, temperature=0, seed=5).sampling(model))
    assert struct.unpack("<i", found["runtime_top_k"][2]) == (1,)
    assert not {"temperature", "runtime_top_p", "seed"} & found.keys()


def test_greedy_log_probabilities_are_those_of_the_whole_vocabulary(model: Model) -> None:
    found = encoded(model, Sampling(temperature=0), log_probs=True)
    assert "runtime_top_k" not in found
    assert 0 < struct.unpack("<f", found["runtime_top_p"][2])[0] < 1e-5


def test_the_engines_tensors(model: Model) -> None:
    found = encoded(model, Sampling(top_k=5, min_tokens=2, presence_penalty=0.5, bias={3: -2.0}), end_ids=[1, 2, 3])
    assert found["input_ids"] == ("INT32", [1, 3], struct.pack("<3i", 5, 6, 7))
    assert found["end_id"] == ("INT32", [1, 1], struct.pack("<i", 1))
    assert found["stop_words_list"] == ("INT32", [1, 2, 2], struct.pack("<4i", 2, 3, 1, 2))
    assert found["min_tokens"][2] == struct.pack("<i", 2)
    kind, shape, content = found["embedding_bias"]
    assert (kind, shape, len(content)) == ("FP32", [1, 4096], 4 * 4096)
    assert struct.unpack("<4096f", content)[3] == -2.0
    assert "repetition_penalty" not in found
    assert encoded(model, end_ids=[])["end_id"][2] == struct.pack("<i", -1)


def test_a_request_to_stop(model: Model) -> None:
    message = encode_stop(model, "x-1")
    assert message.id == "x-1"
    assert tensors(message)["stop"] == ("BOOL", [1, 1], b"\x01")


def response(ids: list[int], log_probs: list[float]) -> Any:
    made = service_pb2.ModelInferResponse()
    for name, content in (
        ("sequence_length", struct.pack("<i", len(ids))),
        ("output_log_probs", struct.pack(f"<{len(log_probs)}f", *log_probs)),
        ("output_ids", struct.pack(f"<{len(ids)}i", *ids)),
    ):
        made.outputs.add(name=name)
        made.raw_output_contents.append(content)
    return made


@given(st.lists(st.lists(st.integers(0, 4095), min_size=1, max_size=3), max_size=6), st.booleans())
def test_log_probabilities_of_the_new_tokens(steps: list[list[int]], cumulative: bool) -> None:
    """An engine returns those of the whole answer with each response; one that returns the new ones only works, too."""
    decoder, seen = Decoder(), 0
    for place, ids in enumerate(steps):
        values = [float(n) for n in range(seen + len(ids))]
        sent = values if cumulative else values[seen:]
        step = decoder.step(response(ids, sent), final=place == len(steps) - 1)
        assert list(step.ids) == ids
        assert list(step.log_probs) == values[seen:]
        assert step.final == (place == len(steps) - 1)
        seen += len(ids)


@pytest.mark.parametrize(
    ("asked", "prompt", "limit"), [(None, 10, 246), (100, 10, 100), (246, 10, 246), (None, 255, 1)]
)
def test_how_many_tokens_an_answer_may_have(model: Model, asked: int | None, prompt: int, limit: int) -> None:
    assert requests.token_limit(asked, prompt, model) == limit
    with pytest.raises(ApiError, match="max_tokens can be"):
        requests.token_limit(247, prompt, model)


def test_messages_for_the_template(model: Model) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "x", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    _, assistant, tool = [message.for_template() for message in chat(model, messages=messages).messages]
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert tool["tool_call_id"] == "1"
