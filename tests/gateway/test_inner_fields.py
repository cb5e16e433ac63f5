"""What the openai package's types allow inside a request's fields: each is taken, ignored or refused.

A later version's new field, or new kind of message, part, item or tool, fails here until someone has decided.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from openai.types.chat import completion_create_params as chat_create
from openai.types.responses import response_create_params as response_create
from typing_extensions import is_typeddict

from builder.gateway import requests
from builder.gateway.errors import ApiError
from builder.gateway.fields import known
from builder.gateway.requests import ChatRequest
from builder.gateway.responses_request import ResponsesRequest

CONTRACT = (Path(__file__).parents[2] / "docs" / "guides" / "requests.md").read_text(encoding="utf-8")


class Fields(NamedTuple):
    """Names of fields, in words."""

    taken: str
    ignored: str = ""
    refused: str = ""


CACHED = Fields("text type", "prompt_cache_breakpoint")
CHAT: dict[str, Fields] = {
    "ChatCompletionDeveloperMessageParam": Fields("content role name"),
    "ChatCompletionSystemMessageParam": Fields("content role name"),
    "ChatCompletionUserMessageParam": Fields("content role name"),
    "ChatCompletionAssistantMessageParam": Fields("role content name tool_calls refusal", "", "audio function_call"),
    "ChatCompletionToolMessageParam": Fields("content role tool_call_id"),
    "ChatCompletionContentPartTextParam": CACHED,
    "ChatCompletionMessageFunctionToolCallParam": Fields("id function type"),
    "chat_completion_message_function_tool_call_param.Function": Fields("arguments name"),
    "ResponseFormatText": Fields("type"),
    "ResponseFormatJSONObject": Fields("type"),
    "ResponseFormatJSONSchema": Fields("type json_schema"),
    "JSONSchema": Fields("schema strict", "name description"),
    "ChatCompletionStreamOptionsParam": Fields("include_usage", "include_obfuscation"),
    "ChatCompletionNamedToolChoiceParam": Fields("type function"),
    "chat_completion_named_tool_choice_param.Function": Fields("name"),
    "ChatCompletionFunctionToolParam": Fields("type function"),
    "FunctionDefinition": Fields("name description parameters strict"),
}
RESPONSES: dict[str, Fields] = {
    "EasyInputMessageParam": Fields("content role type", "phase"),
    "response_input_param.Message": Fields("content role type", "status"),
    "ResponseOutputMessageParam": Fields("content role type", "id status phase"),
    "ResponseInputTextParam": CACHED,
    "ResponseInputTextContentParam": CACHED,
    "ResponseOutputTextParam": Fields("text type", "annotations logprobs"),
    "ResponseFunctionToolCallParam": Fields("arguments call_id name type", "id status async caller namespace"),
    "FunctionCallOutput": Fields("call_id output type", "id status name caller namespace"),
    "ResponseReasoningItemParam": Fields("content type", "id summary encrypted_content status"),
    "response_reasoning_item_param.Content": Fields("text type"),
    "Reasoning": Fields("effort", "summary generate_summary", "context mode"),
    "StreamOptions": Fields("", "include_obfuscation"),
    "ResponseTextConfigParam": Fields("format", "verbosity"),
    "ResponseFormatText": Fields("type"),
    "ResponseFormatJSONObject": Fields("type"),
    "ResponseFormatTextJSONSchemaConfigParam": Fields("type schema strict", "name description"),
    "ToolChoiceFunctionParam": Fields("name type"),
    "FunctionToolParam": Fields("name description parameters strict type", "",
                                "async allowed_callers defer_loading output_schema"),
}  # fmt: skip

Found = tuple[tuple[str, ...], Any]  # the names of the fields that lead to a type, and the type


def title(theirs: Any, table: Mapping[str, Fields]) -> str:
    """The type's name in the table, with its module where several have the name."""
    long = f"{theirs.__module__.rpartition('.')[2]}.{theirs.__name__}"
    return long if long in table else str(theirs.__name__)


def objects(hint: Any) -> Iterator[Any]:
    """The types of objects in a type hint."""
    if is_typeddict(hint):
        yield hint
    else:
        for part in typing.get_args(hint):
            yield from objects(part)


def walk(hints: Mapping[str, Any], table: Mapping[str, Fields], path: tuple[str, ...] = ()) -> Iterator[Found]:
    """Each type of an object inside of these fields, but nothing inside of types that are not in the table."""
    for name, hint in hints.items():
        for theirs in objects(hint):
            yield (*path, name), theirs
            if entry := table.get(title(theirs, table)):
                inner = typing.get_type_hints(theirs)
                taken = {one: inner[one] for one in entry.taken.split() if one in inner}
                yield from walk(taken, table, (*path, name))


def top(theirs: Any, ours: Any) -> dict[str, Any]:
    """The hints of the fields that the gateway takes."""
    return {name: hint for name, hint in typing.get_type_hints(theirs).items() if name in ours.model_fields}


IN_CHAT = list(walk(top(chat_create.CompletionCreateParamsStreaming, ChatRequest), CHAT))
IN_RESPONSES = list(walk(top(response_create.ResponseCreateParamsStreaming, ResponsesRequest), RESPONSES))


def sample(hint: Any, depth: int = 0) -> Any:
    """A value of this type."""
    if is_typeddict(hint):
        fields = typing.get_type_hints(hint).items()
        return {name: sample(inner, depth + 1) for name, inner in fields if depth < 5}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return parts[0]
    if origin is typing.Union or str(origin) == "<class 'types.UnionType'>":
        return sample(next(part for part in parts if part is not type(None)), depth)
    if hint in (int, float, bool):
        return hint(1)
    if origin is not None and parts and not issubclass(origin, Mapping):
        return [sample(parts[0], depth + 1)]
    return "x" if hint is str else {}


def take_chat(body: Any) -> dict[str, Any]:
    fields = known(requests.json_object(json.dumps(body).encode()), ChatRequest.model_fields)
    found = requests.validated(ChatRequest, fields)
    shown = found.model_dump(exclude={"messages": True, "stream_options": {"include_obfuscation"}})
    return {**shown, "messages": [one.for_template() for one in found.messages]}


def take_responses(body: Any) -> dict[str, Any]:
    found = ResponsesRequest.parse(json.dumps(body).encode()).conversation()
    return {**found.model_dump(exclude={"messages"}), "messages": [one.for_template() for one in found.messages]}


def chat_with(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A request that has the value where the path leads."""
    user: dict[str, Any] = {"role": "user", "content": "x"}
    body: dict[str, Any] = {"model": "m", "messages": [user]}
    if path == ("messages",):
        body["messages"] = [value]
    elif path == ("messages", "content"):
        user["content"] = [value]
    elif path == ("messages", "tool_calls"):
        body["messages"] = [{"role": "assistant", "content": None, "tool_calls": [value]}]
    else:
        body[path[0]] = [value] if path[0] == "tools" else value
    return body


def response_with(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A request that has the value where the path leads."""
    body: dict[str, Any] = {"model": "m", "input": "x"}
    if path == ("input",):
        body["input"] = [value]
    elif path == ("input", "content"):
        body["input"] = [{"type": "message", "role": "user", "content": [value]}]
    elif path == ("input", "output"):
        body["input"] = [{"type": "function_call_output", "call_id": "1", "output": [value]}]
    elif path == ("text", "format"):
        body["text"] = {"format": value}
    else:
        body[path[0]] = [value] if path[0] == "tools" else value
    return body


SIDES = {
    "chat": (CHAT, IN_CHAT, take_chat, chat_with),
    "responses": (RESPONSES, IN_RESPONSES, take_responses, response_with),
}
ENTRIES = [(side, title(theirs, found[0]), theirs) for side, found in SIDES.items() for _, theirs in found[1]
           if title(theirs, found[0]) in found[0]]  # fmt: skip
OTHERS = [(side, path, theirs) for side, found in SIDES.items() for path, theirs in found[1]
          if title(theirs, found[0]) not in found[0]]  # fmt: skip


def test_the_types_were_found() -> None:
    """All of the table, and what no other test would miss: kinds of messages, parts, items and tools."""
    for table, found, _, _ in SIDES.values():
        assert {title(theirs, table) for _, theirs in found} >= set(table)
    names = {theirs.__name__ for _, _, theirs in OTHERS}
    assert {"ChatCompletionFunctionMessageParam", "ChatCompletionContentPartImageParam", "ItemReference"} <= names
    assert len(names) > 30


@pytest.mark.parametrize(("side", "name", "theirs"), ENTRIES, ids=[f"{side}-{name}" for side, name, _ in ENTRIES])
def test_each_field_is_decided(side: str, name: str, theirs: Any) -> None:
    entry = SIDES[side][0][name]
    decided = [word for words in entry for word in words.split()]
    assert sorted(decided) == sorted(typing.get_type_hints(theirs))
    table = CONTRACT.partition("| inside of a field |")[2].partition("\n\n")[0]
    for word in [*entry.ignored.split(), *entry.refused.split()]:
        assert f"`{word}`" in table


@pytest.mark.parametrize(("side", "path", "theirs"), OTHERS, ids=[f"{one[0]}-{one[2].__name__}" for one in OTHERS])
def test_other_kinds_are_refused(side: str, path: tuple[str, ...], theirs: Any) -> None:
    _, _, take, place = SIDES[side]
    with pytest.raises(ApiError) as raised:
        take(place(path, sample(theirs)))
    assert raised.value.status == 400


PLACES = {
    ("messages",), ("messages", "content"), ("messages", "tool_calls"), ("tools",), ("tool_choice",),
    ("stream_options",), ("input",), ("input", "content"), ("input", "output"), ("reasoning",), ("text",),
}  # fmt: skip
PLACED = [(side, path, theirs) for side, found in SIDES.items() for path, theirs in found[1]
          if title(theirs, found[0]) in found[0] and path in PLACES]  # fmt: skip


@pytest.mark.parametrize(("side", "path", "theirs"), PLACED, ids=[f"{one[0]}-{one[2].__name__}" for one in PLACED])
def test_ignored_fields_change_nothing_and_refused_ones_are_errors(
    side: str, path: tuple[str, ...], theirs: Any
) -> None:
    table, _, take, place = SIDES[side]
    entry, whole = table[title(theirs, table)], sample(theirs)
    if whole.get("role") == "assistant" and "output_text" in str(whole):
        whole["content"] = [{"type": "output_text", "text": "x"}]
    if whole.get("type") == "reasoning":
        whole["content"] = [{"type": "reasoning_text", "text": "x"}]
    plain = {name: value for name, value in whole.items() if name in entry.taken.split()}
    if path == ("text",):
        plain["format"] = {"type": "text"}
    found = take(place(path, plain))
    for name in entry.ignored.split():
        assert take(place(path, {**plain, name: whole[name]})) == found
    for name in entry.refused.split():
        value = {"context": "all_turns", "mode": "pro"}.get(name, whole[name])
        with pytest.raises(ApiError) as raised:
            take(place(path, {**plain, name: value}))
        assert raised.value.status == 400
        assert name in raised.value.message


def test_a_refusal_is_what_the_assistant_said() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "No."}
    assert take_chat({"model": "m", "messages": [refused]})["messages"] == [{"role": "assistant", "content": "No."}]


def test_log_probabilities_of_a_response_are_refused() -> None:
    body = {"model": "m", "input": "x", "include": ["reasoning.encrypted_content"]}
    assert take_responses(body)["messages"]
    with pytest.raises(ApiError, match=r"omit message\.output_text\.logprobs"):
        take_responses({**body, "include": ["message.output_text.logprobs"]})
