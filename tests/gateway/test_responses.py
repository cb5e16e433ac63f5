"""/v1/responses with the real openai client and a real Triton (see test_chat_parts)."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, response_create_params

from builder.gateway.responses_request import IGNORED, REFUSED, ResponsesRequest
from tests.gateway.conftest import MODEL, Serve
from tests.gateway.test_chat_parts import CALL, OTHER, TEMPLATE
from tests.gateway.test_openai import known_only

TOOLS: Any = [{"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True}
              for name in ("add", "weather")]  # fmt: skip


@pytest.fixture(scope="module")
def client(serve_with: Serve) -> Iterator[openai.OpenAI]:
    with serve_with(TEMPLATE).client() as found:
        yield found


def ask(client: openai.OpenAI, input: Any, **options: Any) -> Response:
    """The response, after a check that the stream ends with the same one and builds it piece by piece."""
    whole = client.responses.create(model=MODEL, input=input, **options)
    known_only(whole)
    texts: dict[tuple[int, str], str] = {}
    numbers = []
    with client.responses.create(model=MODEL, input=input, stream=True, **options) as events:
        for event in events:
            known_only(event)
            numbers.append(event.sequence_number)
            if event.type.endswith(".delta"):
                key = (event.output_index, event.type)
                texts[key] = texts.get(key, "") + event.delta
    assert numbers == list(range(len(numbers)))
    assert event.type in ("response.completed", "response.incomplete")
    assert shown(event.response) == shown(whole)
    assert event.response.usage == whole.usage
    assert event.response.status == whole.status
    assert "".join(text for (_, kind), text in texts.items() if "output_text" in kind) == whole.output_text
    return whole


def shown(response: Response) -> list[Any]:
    """The output without ids."""
    dumped = [item.model_dump() for item in response.output]
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in dumped]


def test_every_field_of_openais_requests_is_known() -> None:
    for theirs in (response_create_params.ResponseCreateParamsNonStreaming,
                   response_create_params.ResponseCreateParamsStreaming):  # fmt: skip
        assert set(typing.get_type_hints(theirs)) - {*ResponsesRequest.model_fields, *IGNORED, *REFUSED} == set()


def test_the_contract_names_the_fields() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "requests.md").read_text(encoding="utf-8")
    text = text.partition("/v1/responses`](")[2].partition("| status |")[0]
    for name in {*ResponsesRequest.model_fields, *IGNORED, *REFUSED} - {"model"}:
        assert f"`{name}`" in text


def test_a_text(client: openai.OpenAI) -> None:
    found = ask(client, "Grüße 🎉", max_output_tokens=50)
    assert (found.output_text, found.status, found.model) == ("Grüße 🎉", "completed", MODEL)
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert ask(client, "Grüße", instructions="Be brief.").usage.input_tokens > ask(client, "Grüße").usage.input_tokens  # type: ignore[union-attr]


def test_an_answer_that_is_cut_off(client: openai.OpenAI) -> None:
    found = ask(client, "one two three four", max_output_tokens=2)
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert "one two three four".startswith(found.output_text)


def test_reasoning_and_calls(client: openai.OpenAI) -> None:
    found = ask(client, f"<think>I add.</think>Yes.\n{CALL}\n{OTHER}", tools=TOOLS)
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call", "function_call"]
    call: Any = found.output[2]
    assert (call.name, call.arguments) == ("add", '{"a": 1, "b": "Grüße"}')
    assert found.usage is not None
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    assert ask(client, CALL, tools=TOOLS, tool_choice="none").output_text == CALL
    forced: Any = {"type": "function", "name": "add"}
    assert ask(client, " {}}", tools=TOOLS, tool_choice=forced).output[0].type == "function_call"


def test_a_stream_of_the_clients_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=f"Yes.\n{CALL}", tools=TOOLS) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == "Yes."
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert "response.function_call_arguments.done" in kinds


def test_a_malformed_call(client: openai.OpenAI) -> None:
    """In a stream its beginning was sent, so an incomplete item stays; the text is the same."""
    wrong = CALL.replace("}\n", "]\n")
    assert client.responses.create(model=MODEL, input=wrong, tools=TOOLS).output_text == wrong
    *_, last = client.responses.create(model=MODEL, input=wrong, tools=TOOLS, stream=True)
    assert last.type == "response.completed"
    assert last.response.output_text == wrong
    assert [item.status for item in last.response.output] == ["incomplete", "completed"]  # type: ignore[union-attr]


def test_the_history(client: openai.OpenAI) -> None:
    """The output of a response can be the input of the next one."""
    first = client.responses.create(model=MODEL, input=f"<think>I add.</think>{CALL}", tools=TOOLS)
    call: Any = first.output[-1]
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Add."}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"},
        {"type": "message", "role": "developer", "content": "It is 3."},
    ]
    chat = ResponsesRequest.model_validate({"model": MODEL, "input": items}).conversation()
    user, assistant, tool, system = (message.for_template() for message in chat.messages)
    assert (user["content"], system["role"]) == ("Add.", "system")
    assert assistant["reasoning_content"] == "I add."
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": "Grüße"}}
    assert (tool["content"], tool["tool_call_id"]) == ("3", assistant["tool_calls"][0]["id"])
    assert ask(client, items, tools=TOOLS).output_text == "It is 3."


def test_reasoning_before_each_of_several_calls_is_kept() -> None:
    items: list[Any] = [{"role": "user", "content": "Add."}]
    for number in "12":
        items.append({"type": "reasoning", "content": [{"type": "reasoning_text", "text": f"Call {number}."}]})
        items.append({"type": "function_call", "call_id": number, "name": "add", "arguments": "{}"})
    chat = ResponsesRequest.model_validate({"model": MODEL, "input": items}).conversation()
    assistant = chat.messages[1].for_template()
    assert assistant["reasoning_content"] == "Call 1.Call 2."
    assert [call["id"] for call in assistant["tool_calls"]] == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"store": True}, "does not support stored responses"),
        ({"previous_response_id": "resp_1"}, "does not support stored responses"),
        ({"background": True}, "in the background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}}, "'x' is not one of JSON"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "does not support items of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "parts that are texts"),
        ({"input": [{"role": "king", "content": "x"}]}, "input: Input should be"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"extra_body": {"max_tokens": 5}}, "Did you mean max_output_tokens"),
    ],
)
def test_what_is_rejected(client: openai.OpenAI, options: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        client.responses.create(**{"model": MODEL, "input": "x", **options})


def test_another_models_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.responses.create(model="other", input="x")
    assert ask(client, "x", store=False, metadata={"a": "b"}).output_text == "x"
