"""Grammars of tool calls: of whatever a grammar lets through, the gateway's parser finds valid calls, or none.

As in test_json_schema, tokens are single bytes and drawn at random: the answers of the worst model. `bent` draws lean
towards the texts that calls consist of, so that near misses come, too.
"""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from byte_tokens import END, SIZE, write_info
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.gateway.chat_forms import THINK, TOOL_CALL_FORMS, ToolCallForm
from builder.gateway.parsers import AnswerParser
from builder.gateway.reasoning import Reasoning
from builder.gateway.tool_calls import ToolCalls
from builder.grammar import tool_calls
from builder.grammar.errors import GrammarError
from builder.grammar.guides import Guide
from builder.grammar.matching import Compiler
from builder.grammar.tool_calls import SPACE, Answer, Begun, Function

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {"add": ADD, "now": {"type": "object", "properties": {}, "additionalProperties": False}}
FUNCTIONS = [Function(name, schema, strict=True) for name, schema in SCHEMAS.items()]
FORMS = {name: form.grammar(()) for name, form in TOOL_CALL_FORMS.items()}
LIKELY = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS] [", '{"name": "add", ',
    '"parameters": {"a": 1}}', "now[ARGS]{}", "[TOOL_CALLS]", "<tool_", "\n", "{", " ", "a",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(write_info(tmp_path_factory.mktemp("bytes") / "info.json"), SIZE)


def drawn(compiler: Compiler, text: str, seed: int, *, most: int = 400) -> str | None:
    """A random answer to a grammar; None if it did not end."""
    match, chance, made = compiler.match(Guide("ebnf_grammar", text)), random.Random(seed), bytearray()
    wanted: list[int] = []
    for _ in range(most):
        allowed = (match.masked(torch.zeros(SIZE)) == 0).nonzero().flatten().tolist()
        assert allowed, (bytes(made), "nothing can follow")
        if not wanted and chance.random() < 0.5:
            wanted = list(chance.choice(LIKELY).encode())
        token = wanted.pop(0) if wanted and wanted[0] in allowed else chance.choice(allowed)
        if token != wanted and END in allowed and chance.random() < 0.1:
            token = END
        match.accept(token)
        if token == END:
            return made.decode("utf-8", "replace")
        made.append(token)
    return None


def found(form: ToolCallForm, text: str, *, begun: str = "", parser: Reasoning | None = None) -> tuple[str, list[Any]]:
    """The content of an answer and its calls, after a check that each call was complete and is valid."""
    reader = AnswerParser(parser, ToolCalls(form, list(SCHEMAS)), forced=begun)
    parts = [*reader.add(text), *reader.rest()]
    assert not [part for part in parts if part.kind == "dropped"], text
    calls: list[list[str]] = []
    for part in parts:
        if part.kind == "call":
            calls.append([part.text, ""])
        elif part.kind == "arguments":
            calls[-1][1] += part.text
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return "".join(part.text for part in parts if part.kind == "content"), calls


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 1 << 30), thinks=st.booleans(), opened=st.booleans())
@example(name="llama3", seed=9060, thinks=True, opened=True)  # a control character before "{", after the reasoning
def test_what_looks_like_a_call_is_a_valid_one(
    compiler: Compiler, name: str, seed: int, thinks: bool, opened: bool
) -> None:
    reasoning = ("<think>", "</think>") if thinks else None
    answer = Answer(reasoning=reasoning, opened=thinks and opened)
    text = drawn(compiler, tool_calls.grammar(FUNCTIONS, FORMS[name], answer), seed)
    if text is None:
        return
    form = TOOL_CALL_FORMS[name]
    content, calls = found(form, text, parser=Reasoning(THINK, opened=answer.opened) if thinks else None)
    marks = [mark for mark in form.openings if mark]
    assert not any(mark in content for mark in marks), "no call is left in the text"
    assert calls or not content.lstrip(SPACE).startswith("{") or "" not in form.openings


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 1 << 30),
    begun=st.sampled_from(["name", "arguments"]),
    many=st.booleans(),
)
def test_an_answer_that_must_call(compiler: Compiler, name: str, seed: int, begun: Begun, many: bool) -> None:
    form = TOOL_CALL_FORMS[name]
    functions = FUNCTIONS if begun == "name" else FUNCTIONS[:1]
    text = drawn(compiler, tool_calls.grammar(functions, FORMS[name], Answer(begun=begun, many=many)), seed)
    if text is not None:
        content, calls = found(form, text, begun=form.forced("add" if begun == "arguments" else None))
        assert calls
        assert len(calls) == 1 or many
        assert not content.strip()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 30))
def test_json_or_calls(compiler: Compiler, seed: int) -> None:
    schema = {"type": "array", "items": {"enum": [1, "<tool_call>"]}}
    answer = Answer(content=schema, strict_content=True)
    text = drawn(compiler, tool_calls.grammar(FUNCTIONS, FORMS["hermes"], answer), seed)
    if text is not None and not text.startswith("<tool_call>"):
        jsonschema.validate(json.loads(text), schema)
    elif text is not None:
        assert found(TOOL_CALL_FORMS["hermes"], text)[1]


def test_any_text_without_a_mark_is_possible(compiler: Compiler) -> None:
    grammar = tool_calls.grammar(FUNCTIONS, FORMS["hermes"], Answer())
    for text in ("<", "a <<tool <tool_call", "<tool_cal<tool_call", "1 < 2 und Grüße 🎉\n{}", ""):
        match = compiler.match(Guide("ebnf_grammar", grammar))
        for byte in text.encode():
            match.accept(byte)
        match.accept(END)
    bare = tool_calls.grammar(FUNCTIONS, FORMS["llama3"], Answer())
    for text in ("\n 1 {", "<", "<|python <|", "世"):
        match = compiler.match(Guide("ebnf_grammar", bare))
        for byte in text.encode():
            match.accept(byte)
        match.accept(END)


def test_a_schema_that_a_strict_function_cant_have() -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for schema, says in (
        (wrong, "parameters of f: #/properties/a: uniqueItems"),
        ({"type": "string"}, "must be object"),
    ):
        with pytest.raises(GrammarError, match=says):
            tool_calls.grammar([Function("f", schema, strict=True)], FORMS["hermes"], Answer())
        free = tool_calls.grammar([Function("f", schema, strict=False)], FORMS["hermes"], Answer())
        assert "anyobject" in free.partition("hex ::=")[0] or schema is wrong
