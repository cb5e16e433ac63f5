"""Tool calls, reasoning and control tokens with the real openai client and a real Triton.

The stand-in for the engine repeats the prompt. The chat template here writes the variable `answer` to the prompt's
beginning, so that is the model's answer; what the template writes for the conversation is behind its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.gateway.conftest import MODEL, Running, Serve
from tests.gateway.test_limits import eventually
from tests.gateway.test_openai import known_only

TEMPLATE = (
    "{# <tool_call> #}{{ answer if answer is defined else messages[-1].content }}<|im_end|>"
    "{% for m in messages %}{{ m.role }}{{ m.name }}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "{% endfor %}{{ (tools | length) if tools }}{{ '<think>\n' if enable_thinking }}"
)
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "weather")
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "Grüße"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(serve_with: Serve) -> Iterator[openai.OpenAI]:
    with serve_with(TEMPLATE).client() as found:
        yield found


def ask(client: openai.OpenAI, answer: str | None = None, **options: Any) -> Any:
    """The answer's choice and usage, after a check that the streamed answer has the same parts."""
    kwargs = {**options.pop("kwargs", {}), **({} if answer is None else {"answer": answer})}
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 200,
                  "extra_body": {"chat_template_kwargs": kwargs}, **options}  # fmt: skip
    whole = client.chat.completions.create(**asked)
    choice, streamed = whole.choices[0], stream(client, asked)
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    reasoning = (message.model_extra or {}).get("reasoning_content", "")
    assert streamed == (message.content or "", reasoning, calls, choice.finish_reason)
    message.model_extra and message.model_extra.pop("reasoning_content", None)
    known_only(whole)
    return choice, reasoning, calls, whole.usage


def stream(client: openai.OpenAI, asked: dict[str, Any]) -> tuple[str, str, list[tuple[str, str]], str]:
    content = reasoning = finish = ""
    calls: dict[int, list[str]] = {}
    for event in client.chat.completions.create(**asked, stream=True):
        [choice] = event.choices
        content += choice.delta.content or ""
        reasoning += (choice.delta.model_extra or {}).get("reasoning_content", "")
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id:
                assert call.type == "function"
                assert call.function.name
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
        finish = choice.finish_reason or finish
    assert list(calls) == list(range(len(calls)))
    return content, reasoning, [(name, arguments) for name, arguments in calls.values()], finish


def test_tool_calls(client: openai.OpenAI) -> None:
    choice, _, calls, _ = ask(client, f"I look.\n{CALL}\n{OTHER}", tools=TOOLS)
    assert calls == [("add", '{"a": 1, "b": "Grüße"}'), ("weather", "{}")]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2
    assert all(id.startswith("call_") for id in ids)
    assert ask(client, CALL, tools=TOOLS)[0].message.content is None


def test_arguments_are_streamed(client: openai.OpenAI) -> None:
    events = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], tools=TOOLS, stream=True, logprobs=True,
        extra_body={"chat_template_kwargs": {"answer": CALL}},
    )  # fmt: skip
    deltas = [call for event in events for call in event.choices[0].delta.tool_calls or []]
    assert [bool(call.id) for call in deltas].count(True) == 1
    assert deltas[0].id
    assert len(deltas) > 3, "the arguments come in several pieces"


def test_one_call(client: openai.OpenAI) -> None:
    choice, _, calls, usage = ask(client, f"{CALL}\n{OTHER}", tools=TOOLS, parallel_tool_calls=False)
    assert [name for name, _ in calls] == ["add"]
    assert choice.finish_reason == "tool_calls"
    assert usage.completion_tokens < ask(client, f"{CALL}\n{OTHER}", tools=TOOLS)[3].completion_tokens


@pytest.mark.parametrize("answer", ["<tool_call>\nno call\n</tool_call>", CALL.replace('"add"', '"other"'), "1 < 2 <t"])
def test_what_is_no_call_is_content(client: openai.OpenAI, answer: str) -> None:
    choice, _, calls, _ = ask(client, answer, tools=TOOLS)
    assert (choice.message.content, calls, choice.finish_reason) == (answer, [], "stop")


def test_a_call_that_is_cut_off_is_content(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 20, "tools": TOOLS}
    asked["extra_body"] = {"chat_template_kwargs": {"answer": CALL}}
    [choice] = client.chat.completions.create(**asked).choices
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")
    assert choice.message.content
    assert CALL.startswith(choice.message.content)
    assert stream(client, asked)[0] == choice.message.content


def test_no_tools_no_calls(client: openai.OpenAI) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice, _, calls, _ = ask(client, CALL, **options)
        assert (choice.message.content, calls, choice.finish_reason) == (CALL, [], "stop")


def test_a_function_that_must_be_called(client: openai.OpenAI) -> None:
    """The prompt ends with the beginning of a call, which the answer continues."""
    named: Any = {"type": "function", "function": {"name": "weather"}}
    _, _, calls, usage = ask(client, ' {"city": "Paris"}}', tools=TOOLS, tool_choice=named)
    assert calls == [("weather", '{"city": "Paris"}')]
    _, _, calls, _ = ask(client, 'add", "arguments": {}}', tools=TOOLS, tool_choice="required")
    assert calls == [("add", "{}")]
    assert usage.prompt_tokens > ask(client, ' {"city": "Paris"}}', tools=TOOLS)[3].prompt_tokens


def test_the_template_gets_tools_and_the_history(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "x", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    choice, *_ = ask(client, messages=messages, tools=TOOLS, extra_body={"ignore_eos": True}, max_tokens=110)
    arguments = '"function": {"arguments": {"a": 1}, "name": "add"}'
    assert choice.message.content.startswith("2usermexassistant[{")
    assert arguments in choice.message.content or '"name": "add", "arguments": {"a": 1}' in choice.message.content
    assert "tool22" in choice.message.content, "and there are 2 tools"


def test_reasoning(client: openai.OpenAI) -> None:
    choice, reasoning, _, usage = ask(client, "<think>\nI add 🎉.\n</think>\n\nIt is 3.")
    assert (reasoning, choice.message.content, choice.finish_reason) == ("I add 🎉.", "It is 3.", "stop")
    assert 4 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    opened = ask(client, "I add.\n</think>\n\nIt is 3.", kwargs={"enable_thinking": True})
    assert (opened[1], opened[0].message.content) == ("I add.", "It is 3.")
    plain = ask(client, "I add.\n</think>\n\nIt is 3.", kwargs={"enable_thinking": True}, reasoning_effort="none")
    assert plain[1] == "I add.", "the variable itself comes first"
    plain = ask(client, "It is 3.", reasoning_effort="none")
    assert (plain[1], plain[3].completion_tokens_details.reasoning_tokens) == ("", 0)


def test_a_call_after_reasoning(client: openai.OpenAI) -> None:
    choice, reasoning, calls, _ = ask(client, f"<think>\nI add.\n</think>\n\n{CALL}", tools=TOOLS)
    assert (reasoning, choice.message.content, [name for name, _ in calls]) == ("I add.", None, ["add"])


def test_stop_strings_match_the_content_alone(client: openai.OpenAI) -> None:
    choice, reasoning, _, _ = ask(client, "<think>one two</think>\n\none two three", stop="two")
    assert (reasoning, choice.message.content, choice.finish_reason) == ("one two", "one ", "stop")
    _, _, calls, _ = ask(client, CALL, tools=TOOLS, stop=["Grüße", "add"])
    assert [name for name, _ in calls] == ["add"]


def test_log_probabilities_of_every_token(client: openai.OpenAI) -> None:
    answer = f"<think>I</think>a {CALL}"
    choice, _, _, usage = ask(client, answer, tools=TOOLS, logprobs=True)
    tokens = choice.logprobs.content
    assert len(tokens) == usage.completion_tokens
    assert "".join(token.token for token in tokens).startswith("<think>I</think>a <tool_call>")


def test_control_tokens_in_a_message_are_text(client: openai.OpenAI) -> None:
    """Otherwise the answer would end there, because the stand-in stops at the end token."""
    text = "a <|im_end|>\n<|im_start|>system\nGrüße"
    assert ask(client, messages=[{"role": "user", "content": text}])[0].message.content == text


def test_control_tokens_that_the_recipe_allows(serve_with: Serve) -> None:
    with serve_with(TEMPLATE, parse_special_tokens="everywhere").client() as client:
        assert ask(client, messages=[{"role": "user", "content": "a <|im_end|> b"}])[0].message.content == "a "
    with serve_with(TEMPLATE, parse_special_tokens="never", skip_special_tokens=False).client() as client:
        assert ask(client, messages=[{"role": "user", "content": "a <|im_end|> b"}])[0].message.content == (
            "a <|im_end|> b"
        )
        made = client.completions.create(model=MODEL, prompt="a <|im_end|> b", max_tokens=9)
        assert made.choices[0].text.startswith("a <|im_end|> b")


def test_the_log_has_what_was_derived(serve_with: Serve) -> None:
    found = serve_with(TEMPLATE, sampling_defaults={"temperature": 0.5})
    [line] = eventually_lines(found)
    assert line["end_ids"] == ["4089 <|im_end|>", "4087 <|endoftext|>"]
    assert (line["tool_calls"], line["reasoning"]) == ("hermes", "think")
    assert line["sampling_defaults"]["temperature"] == 0.5


def eventually_lines(gateway: Running) -> list[dict[str, Any]]:
    assert eventually(lambda: any(line.get("event") == "model" for line in gateway.lines))
    return [line for line in gateway.lines if line.get("event") == "model"]


MISTRAL = {"<tool_response>": "[TOOL_CALLS]", "</tool_response>": "[ARGS]"}


def test_marks_that_are_special_tokens(serve_with: Serve) -> None:
    template = '{# tools #}[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]weather[ARGS]{}<|im_end|>{{ messages[-1].content }}'
    with serve_with(template, MISTRAL).client() as client:
        choice, _, calls, _ = ask(client, tools=TOOLS)
        assert calls == [("add", '{"a": 1}'), ("weather", "{}")]
        assert all(len(call.id) == 9 for call in choice.message.tool_calls)
        assert ask(client)[0].message.content == 'add{"a": 1}weather{}', "special tokens have no text"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "two functions have the same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no function 'x'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools.0.function.name"),
        ({"functions": [{"name": "x"}]}, "deprecated form of tools"),
    ],
)
def test_tools_that_are_rejected(client: openai.OpenAI, options: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], **options)
