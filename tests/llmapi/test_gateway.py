"""The llmapi repository behind `builder gateway`: a real Triton, with a stand-in for TensorRT-LLM's LLM class."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from llmapi_stand_in import SAY, put_stand_in

from builder.core.errors import UsageError
from builder.core.store import Store
from builder.serving.server import Server, serve
from tests.gateway.test_serve import PARAMETERS, PERSON, TALK, command, form, function
from tests.llmapi.test_launch import adapter
from tests.llmapi.test_serving import QUIET, unified, write

__all__ = ["unified"]
ANSWER = "One two three. Grüße 世界 🎉 x\u0301!"
NAME = "tiny"


@dataclass
class Served:
    url: str
    server: Server

    def log(self) -> str:
        return self.server.log.read_text()


@pytest.fixture(scope="module")
def served(unified: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tmp = tmp_path_factory.mktemp("served")
    asked = {
        "llmapi.args.lora_config.lora_dir": [str(adapter(tmp / "one"))],
        "repository.guided_decoding": True,
        "repository.tool_calls": "hermes",
    }

    def make(directory: Path) -> dict[str, Any]:
        facts = write(directory / "models", unified, **asked)
        put_stand_in(directory / "models")
        return facts

    path = Store(tmp / "store", QUIET).stage("repository", {}, make).path
    with (
        serve(path / "models", out=QUIET, log=tmp / "log") as server,
        command("gateway", str(path), "--grpc", server.grpc_url, "--model-name", NAME) as (found, _),
    ):
        yield Served(found["url"], server)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as found:
        yield found


def streamed(client: openai.OpenAI, **asked: Any) -> str:
    events = list(client.completions.create(**asked, stream=True))
    assert all("\ufffd" not in event.choices[0].text for event in events)
    return "".join(event.choices[0].text for event in events)


def test_texts_streamed_or_not_and_their_usage(client: openai.OpenAI) -> None:
    asked: Any = {"model": NAME, "prompt": SAY + ANSWER, "max_tokens": 60, "temperature": 0, "stop": "!"}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == ANSWER.removesuffix("!")
    assert whole.choices[0].finish_reason == "stop"
    assert streamed(client, **asked) == whole.choices[0].text
    assert whole.usage is not None
    assert 10 < whole.usage.completion_tokens < 60
    assert whole.usage.prompt_tokens > whole.usage.completion_tokens
    cut = client.completions.create(**{**asked, "max_tokens": 3})
    assert (cut.choices[0].finish_reason, cut.usage and cut.usage.completion_tokens) == ("length", 3)
    *_, end = client.completions.create(**{**asked, "max_tokens": 3}, stream=True)
    assert end.choices[0].finish_reason == "length"
    *_, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage


@pytest.mark.parametrize("stop", ["two three", ". Gr", "🎉", ["world", "o th", "e three"]])
def test_stop_strings_match_the_text(client: openai.OpenAI, stop: Any) -> None:
    asked: Any = {"model": NAME, "prompt": SAY + ANSWER, "max_tokens": 60, "temperature": 0, "stop": stop}
    found = client.completions.create(**asked).choices[0]
    ends = [at for word in ([stop] if isinstance(stop, str) else stop) if (at := ANSWER.find(word)) >= 0]
    assert found.text == ANSWER[: min(ends)]
    assert streamed(client, **asked) == found.text


def test_a_conversation(client: openai.OpenAI) -> None:
    asked: Any = {"model": NAME, "messages": TALK, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    events = client.chat.completions.create(**asked, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == whole.choices[0].message.content
    assert text
    assert client.responses.create(model=NAME, input=TALK, max_output_tokens=12, temperature=0).output_text == text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(served: Served, stream: bool) -> None:
    before = served.log().count("stand-in: aborted")
    body = json.dumps({"model": NAME, "prompt": "A list is", "max_tokens": 200, "temperature": 0, "ignore_eos": True,
                       "stream": stream}).encode()  # fmt: skip
    host, _, port = served.url.removeprefix("http://").removesuffix("/v1").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        if stream:
            assert connection.recv(99)
        else:
            time.sleep(0.3)
    deadline = time.monotonic() + 20
    while served.log().count("stand-in: aborted") == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_adapter_is_a_models_name(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:one"]
    assert client.completions.create(model=f"{NAME}:one", prompt="A list", max_tokens=2, temperature=0).choices[0].text
    assert [json.loads(text)["lora_name"] for text in re.findall(r"stand-in: adapter (\{.*\})", served.log())] == [
        "one"
    ]


@pytest.mark.parametrize(("field", "value"), [("logprobs", 0), ("logit_bias", {"1": 1})])
def test_what_the_class_does_not_return_is_refused(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"does not support {field}"):
        client.completions.create(**{"model": NAME, "prompt": "x", field: value})


def test_answers_follow_a_schema_and_required_calls_are_complete(client: openai.OpenAI) -> None:
    asked: Any = {"model": NAME, "messages": TALK, "max_tokens": 120, "temperature": 0}
    found = client.chat.completions.create(**asked, response_format=form(PERSON)).choices[0]
    events = client.chat.completions.create(**asked, response_format=form(PERSON), stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == found.message.content
    assert found.finish_reason == "stop"
    jsonschema.validate(json.loads(found.message.content or ""), PERSON)
    made = client.chat.completions.create(**asked, tools=[function("weather")], tool_choice="required").choices[0]
    [call] = (made.message.tool_calls or [])[:1]
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_a_grammar_needs_the_recipes_consent(unified: Path, tmp_path: Path) -> None:
    assert "guided_decoding" not in write(tmp_path / "plain", unified)
    with pytest.raises(UsageError, match=r"llmapi\.args\.guided_decoding_backend belongs to a key of its own"):
        write(tmp_path / "twice", unified, **{"llmapi.args.guided_decoding_backend": "xgrammar"})
    with pytest.raises(UsageError, match="speculative_config can't be combined"):
        write(tmp_path / "both", unified, **{"repository.guided_decoding": True,
                                             "llmapi.args.speculative_config.decoding_type": "NGram"})  # fmt: skip


def test_a_tokenizer_that_the_class_would_misread(unified: Path, tmp_path: Path) -> None:
    asked = {"repository.guided_decoding": True}
    with pytest.raises(UsageError, match="eos_token is none of the model's end ids") as raised:
        write(tmp_path / "ends", unified, **asked, **{"repository.end_ids": [5]})
    assert raised.value.hint == "Omit guided_decoding."
