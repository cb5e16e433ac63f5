"""Tool calls and reasoning in a text are found however it is cut into pieces, and nothing of it is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.gateway.chat_forms import (
    HERMES,
    LLAMA3,
    MAGISTRAL,
    MISTRAL,
    MISTRAL_NAMED,
    THINK,
    TOOL_CALL_FORMS,
    ToolCallForm,
    reasoning_form,
    tool_call_form,
)
from builder.gateway.parsers import AnswerParser
from builder.gateway.reasoning import Reasoning
from builder.gateway.tool_calls import ToolCalls

NAMES = ("get_weather", "add")
PARIS = {"city": "Paris 🎉", "note": 'a "quoted" }{ text </tool_call>'}
ARGUMENTS = json.dumps(PARIS, ensure_ascii=False)


class Result:
    """What a client gets: of a whole answer, and in `sent` of a streamed one."""

    def __init__(self) -> None:
        self.content = self.reasoning = ""
        self.calls: list[list[str]] = []
        self.sent: dict[int, list[str]] = {}

    def key(self) -> Any:
        return self.content, self.reasoning, self.calls, self.sent


def read(parser: AnswerParser, pieces: Sequence[str]) -> Result:
    found = Result()
    for parts in [*(parser.add(piece) for piece in pieces), parser.rest()]:
        for part in parts:
            if part.kind == "call":
                found.calls.append([part.text, ""])
                found.sent[part.number] = [part.text, ""]
                assert part.id
            elif part.kind == "arguments":
                found.calls[-1][1] += part.text
                found.sent[part.number][1] += part.text
            elif part.kind == "dropped":
                found.calls.pop()
            else:
                assert part.text
                setattr(found, part.kind, getattr(found, part.kind) + part.text)
    return found


def calls_in(form: ToolCallForm, *pieces: str, **options: Any) -> Result:
    return read(AnswerParser(None, ToolCalls(form, NAMES), **options), pieces)


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(ends)]


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


WEATHER, ADD = call("get_weather", ARGUMENTS), call("add", "{}")
GOOD = {
    "hermes": (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>"),
    "hermes without the end": (HERMES, f"<tool_call>{WEATHER}\n<tool_call>{ADD}"),
    "another order of the keys": (
        HERMES, f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "get_weather"}}</tool_call><tool_call>{ADD}',
    ),
    "arguments as a text": (
        HERMES, f'<tool_call>{call("get_weather", json.dumps(ARGUMENTS))}</tool_call>\n<tool_call>{{"name": "add"}}',
    ),
    "llama": (LLAMA3, f"{call('get_weather', ARGUMENTS, 'parameters')}; {call('add', '{}', 'parameters')}"),
    "llama with a type": (LLAMA3, '{"type": "function", ' + WEATHER[1:] + "\n" + ADD),
    "llama with its tag": (LLAMA3, f"<|python_tag|>{call('get_weather', ARGUMENTS, 'parameters')}<|python_tag|>{ADD}"),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {ADD}]"),
    "mistral without the end": (MISTRAL, f"[TOOL_CALLS][{WEATHER},{ADD}"),
    "mistral with names": (MISTRAL_NAMED, f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]add[ARGS]{{}}"),
    "mistral with ids": (MISTRAL_NAMED, f"[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS] {ARGUMENTS} [TOOL_CALLS] add{{}}"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
@given(cuts=st.lists(st.integers(0, 400), max_size=40), before=st.sampled_from(["", "Let me look.\n\n"]))
def test_calls_of_each_form(name: str, cuts: list[int], before: str) -> None:
    form, text = GOOD[name]
    if form is LLAMA3 and not text.startswith("<"):
        before = before and "\n "
    found = calls_in(form, *cut(before + text, cuts))
    assert [name for name, _ in found.calls] == ["get_weather", "add"]
    assert [json.loads(arguments) for _, arguments in found.calls] == [PARIS, {}]
    assert found.content == before.rstrip()


MALFORMED = {
    "no JSON": (HERMES, "<tool_call>\nget_weather(city='Paris')\n</tool_call>"),
    "a function that is not there": (HERMES, f"<tool_call>{call('other', '{}')}</tool_call>"),
    "arguments that are a list": (HERMES, f"<tool_call>{call('add', '[1]')}</tool_call>"),
    "arguments that end early": (HERMES, f"<tool_call>{WEATHER[:40]}"),
    "a bracket too many": (HERMES, '<tool_call>{"name": "add", "arguments": {"a": [1}}}</tool_call>'),
    "a constant that is not JSON's": (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    "a line end in a text": (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "\n"}}</tool_call>'),
    "a key twice": (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}, "name": "get_weather"}</tool_call>'),
    "no name": (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    "only the mark": (HERMES, "a <tool_call> is a mark"),
    "half of the mark": (HERMES, "a <tool_ca"),
    "another JSON": (LLAMA3, '{"answer": {"a": 1}}'),
    "code": (LLAMA3, '<|python_tag|>brave_search.call(query="x")'),
    "not at the beginning": (LLAMA3, f"For example: {ADD}"),
    "a mark as text": (MISTRAL, "[TOOL_CALLS] begins a call"),
    "no arguments": (MISTRAL_NAMED, "[TOOL_CALLS]add[ARGS]"),
    "wrong arguments": (MISTRAL_NAMED, "[TOOL_CALLS]add[ARGS]{1}"),
}


@pytest.mark.parametrize("name", MALFORMED)
@given(cuts=st.lists(st.integers(0, 200), max_size=20))
def test_what_is_no_call_is_content(name: str, cuts: list[int]) -> None:
    form, text = MALFORMED[name]
    found = calls_in(form, *cut(text, cuts))
    assert (found.content, found.calls) == (text, [])


def test_arguments_that_are_too_deep_for_a_parser() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 50_000 + "]" * 50_000 + "}}</tool_call>"
    assert calls_in(HERMES, text).content == text


@given(before=st.sampled_from(sorted(GOOD)), after=st.sampled_from(sorted(MALFORMED)))
def test_a_call_next_to_what_is_none(before: str, after: str) -> None:
    form, good = GOOD[before]
    _, wrong = MALFORMED[after]
    found = calls_in(form, f"{good}\n{wrong}")
    assert [name for name, _ in found.calls][:2] == ["get_weather", "add"]
    assert found.content == wrong or len(found.calls) > 2, "nothing of the text is lost"


PIECES = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", "{", "}", '"',
    ",", ";", ":", "\\", " ", "\n", "add", "1", "<think>", "</think>", WEATHER, ADD, '{"name": "add", "arguments": ',
    "text", "🎉", "<", "[TOOL", "</thi",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def parser(form: str | None, *, thinks: bool, opened: bool, single: bool = False) -> AnswerParser:
    calls = ToolCalls(TOOL_CALL_FORMS[form], NAMES, single=single) if form else None
    return AnswerParser(Reasoning(THINK, opened=opened) if thinks else None, calls)


@given(
    text=TEXT,
    cuts=st.lists(st.integers(0, 300), max_size=30),
    form=st.sampled_from([None, *TOOL_CALL_FORMS]),
    thinks=st.booleans(),
    opened=st.booleans(),
    single=st.booleans(),
)
def test_the_cuts_do_not_matter(text: str, cuts: list[int], form: Any, **how: bool) -> None:
    found = read(parser(form, **how), cut(text, cuts))
    assert found.key() == read(parser(form, **how), [text]).key()
    assert all(name in NAMES and isinstance(json.loads(arguments), dict) for name, arguments in found.calls)
    if not found.calls and not how["thinks"]:
        assert found.content == text
    if not found.calls and form is None and how["opened"] and how["thinks"]:
        assert without_space(found.reasoning + "</think>" + found.content).startswith(without_space(text)[:1])
    shown = without_space(found.content + found.reasoning)
    assert not set(shown) - set(without_space(text))
    lost = len(without_space(text)) - len(shown)
    assert lost >= 0
    if not found.calls and "<think>" not in text and "</think>" not in text:
        assert lost == 0, "only the marks of reasoning, and calls, are not in the text"


def without_space(text: str) -> str:
    return "".join(text.split())


def test_arguments_are_passed_on_while_they_come() -> None:
    calls = ToolCalls(HERMES, NAMES)
    kinds = [[part.kind for part in calls.add(piece)] for piece in ('<tool_call>{"name": "add", ', '"arguments": {',
             '"a": 1', "}", "}</tool_call>")]  # fmt: skip
    assert kinds == [[], ["call", "arguments"], ["arguments"], ["arguments"], []]


def test_text_is_passed_on_at_once() -> None:
    calls = ToolCalls(HERMES, NAMES)
    assert [[part.text for part in calls.add(piece)] for piece in ("one", " two", " ", "<", "3")] == [
        ["one"], [" two"], [], [], [" <3"],
    ]  # fmt: skip


def test_one_call_ends_the_answer() -> None:
    calls = ToolCalls(HERMES, NAMES, single=True)
    found = calls.add(f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call>")
    assert [part.kind for part in found] == ["call", "arguments"]
    assert calls.ended
    assert calls.add("more") == calls.rest() == []


@pytest.mark.parametrize("form", TOOL_CALL_FORMS.values())
@pytest.mark.parametrize("name", ["add", None])
def test_a_call_that_the_prompt_begins(form: ToolCallForm, name: str | None) -> None:
    rest = {"mistral-named": "[ARGS]{}"}.get(form.name, f'", "{form.key}": {{}}}}')
    answer = (f"add{rest}") if name is None else "{}" if form.named else " {}}"
    found = calls_in(form, answer, forced=form.forced(name))
    assert (found.calls, found.content) == ([["add", "{}"]], "")
    assert len(ToolCalls(MISTRAL, NAMES).add(f"[TOOL_CALLS] [{ADD}")[0].id) == 9


def reasoned(*pieces: str, opened: bool = False, form: Any = THINK) -> tuple[str, str]:
    found = read(AnswerParser(Reasoning(form, opened=opened), None), pieces)
    return found.reasoning, found.content


@pytest.mark.parametrize(
    ("pieces", "opened", "parts"),
    [
        (["<think>\nI th", "ink.\n</th", "ink>\n\nYes."], False, ("I think.", "Yes.")),
        (["I think.</think>Yes."], True, ("I think.", "Yes.")),
        (["\n<think>\n\n</think>\n\nYes."], False, ("", "Yes.")),
        (["Yes. <think>no</think>"], False, ("", "Yes. <think>no</think>")),
        (["<think>I think </th"], False, ("I think </th", "")),
        (["<thi"], False, ("", "<thi")),
        (["a</think>b</think>c"], True, ("a", "b</think>c")),
    ],
)
def test_reasoning(pieces: list[str], opened: bool, parts: tuple[str, str]) -> None:
    assert reasoned(*pieces, opened=opened) == parts
    assert reasoned(*"".join(pieces), opened=opened) == parts


def test_reasoning_and_calls() -> None:
    text = f"<think>Use a <tool_call>.</think>\n\n<tool_call>{ADD}</tool_call>"
    found = read(AnswerParser(Reasoning(THINK, opened=False), ToolCalls(HERMES, NAMES)), list(text))
    assert (found.reasoning, found.content, found.calls) == ("Use a <tool_call>.", "", [["add", "{}"]])
    assert reasoned("[THINK]a[/THINK]b", form=MAGISTRAL) == ("a", "b")


@pytest.mark.parametrize(
    ("template", "vocabulary", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", (), HERMES),
        ("{% if tools %}<tool_call><function=f>{% endif %}", (), None),
        ("<tool_call>", (), None),
        ("{{ tools }}[TOOL_CALLS]", ("[TOOL_CALLS]",), MISTRAL),
        ("{{ tools }}[TOOL_CALLS]", ("[ARGS]",), MISTRAL_NAMED),
        ("{{ tools }}Environment: ipython \"parameters\"", (), LLAMA3),
        ("{{ tools }}", (), None),
    ],
)  # fmt: skip
def test_the_form_of_a_template(template: str, vocabulary: Any, form: Any) -> None:
    assert tool_call_form(template, vocabulary) is form
    assert tool_call_form(template, vocabulary, "mistral") is MISTRAL
    assert tool_call_form(template, vocabulary, "none") is None


def test_the_form_of_reasoning() -> None:
    assert reasoning_form("x.split('</think>')", ()) is THINK
    assert reasoning_form("", ("<think>", "</think>")) is THINK
    assert reasoning_form("", ("[THINK]", "[/THINK]")) is MAGISTRAL
    assert reasoning_form("plain", ()) is None
    assert reasoning_form("</think>", (), "none") is None
