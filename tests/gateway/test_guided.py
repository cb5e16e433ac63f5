"""response_format at the gateway: bad and hostile schemas get 400 in time, and never reach the engine."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest

from builder.gateway import guided
from builder.grammar.tool_calls import Function
from tests.gateway.conftest import MODEL, Running, Serve
from tests.gateway.test_chat_parts import TEMPLATE

TALK: Any = [{"role": "user", "content": "x"}]


def asked(client: openai.OpenAI, schema: Any, *, strict: bool = False) -> str:
    """The error message for a schema; "" if there is none. (The stand-in for the engine ignores the grammar.)"""
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    try:
        client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=4, response_format=form)
    except openai.BadRequestError as error:
        return error.message if error.param == "response_format" else f"not about response_format: {error}"
    return ""


def deep(levels: int) -> Any:
    made: Any = {"type": "null"}
    for _ in range(levels):
        made = {"type": "array", "items": made}
    return made


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "text"}, "#: the type 'text' is not one of JSON's"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "#/properties/a: the pattern"),
        ({"enum": ["x" * 70_000]}, "The schema has 70014 characters; at most 65536 are possible."),
        (deep(100), "nested more than 64 deep"),
        ({"$ref": "#"}, "# refers to itself"),
    ],
)
def test_a_schema_that_cant_be_used_is_named(client: openai.OpenAI, schema: Any, says: str) -> None:
    assert says in asked(client, schema)


def test_strict_refuses_more(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    assert "uniqueItems is not supported here" in asked(client, schema, strict=True)
    assert asked(client, schema) == ""


def tool(name: str, parameters: Any, *, strict: bool) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


UNIQUE: Any = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": [tool("f", UNIQUE, strict=True)]},
         "The schema can't be used: parameters of f: #/properties/a: uniqueItems is not supported here"),
        ({"tools": [tool("f", {"type": "array"}, strict=True)]}, "parameters of f: #: the type must be object"),
        ({"tools": [tool("f", {"enum": ["x" * 70_000]}, strict=True)]}, "The schema has 70014 characters"),
        ({"tools": [tool(f"f{n}", {"enum": ["x" * 60_000]}, strict=True) for n in range(20)]},
         "The schemas have 1200280 characters; at most 1048576 are possible."),
        ({"tools": [tool("f", UNIQUE, strict=True)], "extra_body": {"min_tokens": 5}},
         "min_tokens can't be combined with strict functions: a complete answer ends."),
    ],
)  # fmt: skip
def test_a_strict_function_that_cant_be_had(serve_with: Serve, options: Any, says: str) -> None:
    with shared(serve_with).client() as client, pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=4, **options)
    assert says in raised.value.message


def test_what_is_not_strict_is_not_refused(serve_with: Serve) -> None:
    hostile = {"type": "object", "properties": {"a": HOSTILE[0]}}
    with shared(serve_with).client() as client:
        for parameters in (UNIQUE, {"type": "array"}, hostile, {"enum": ["x" * 70_000]}):
            for choice in ("auto", "required"):
                made: Any = {"tools": [tool("f", parameters, strict=False)], "tool_choice": choice}
                client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=4, **made)


def test_schemas_that_are_too_large_to_work_on_and_need_not_be_followed() -> None:
    """An object of 8 MB would take half a minute."""
    large = {"enum": ["x" * 60_000]}
    free, strict = (Function("f", large, strict) for strict in (False, True))
    assert guided._bounded([free] * 17) == [free] * 17
    assert guided._bounded([free, strict] * 9) == [Function("f", {}, False), strict] * 9
    assert guided._bounded([Function("f", {"enum": ["x" * 70_000]}, False)]) == [Function("f", {}, False)]


def test_models_without_what_a_grammar_needs(serve_with: Serve) -> None:
    asked: Any = {"model": MODEL, "messages": TALK, "max_tokens": 4, "tools": [tool("f", {}, strict=True)]}
    with serve_with(TEMPLATE, guided_decoding=False).client() as client:
        with pytest.raises(openai.BadRequestError, match="has no guided decoding: omit strict from the functions"):
            client.chat.completions.create(**asked)
        client.chat.completions.create(**{**asked, "tools": [tool("f", {}, strict=False)], "tool_choice": "required"})
    mistral = TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]")
    with serve_with(mistral, {"<tool_call>": "[TOOL_CALLS]"}).client() as client:
        with pytest.raises(openai.BadRequestError, match="calls with special tokens, which a grammar can't have"):
            client.chat.completions.create(**asked)
        client.chat.completions.create(**asked, tool_choice="required")
    llama = TEMPLATE.replace("<tool_call>", 'ipython "parameters"')
    with serve_with(llama).client() as client:
        client.chat.completions.create(**asked)
        with pytest.raises(openai.BadRequestError, match="tools: this model writes calls as JSON"):
            client.chat.completions.create(**asked, response_format={"type": "json_object"})


@cache
def shared(serve_with: Serve) -> Running:
    return serve_with(TEMPLATE)


HOSTILE: list[Any] = [
    {"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"},
    {"type": "string", "pattern": "(" * 400 + "a" + ")*" * 400},
    {"type": "string", "minLength": 99_999, "maxLength": 100_000},
    {"type": "array", "minItems": 90_000, "items": {"type": "array", "minItems": 90_000, "items": {"enum": [1, 2]}}},
    {"anyOf": [{"type": "string", "pattern": f"(a|b|{n})*c(d|e){{0,50}}"} for n in range(800)]},
    {"type": "object", "properties": {f"p{n}": {"type": "number", "minimum": 0.123456789} for n in range(900)}},
    {"$ref": "#/$defs/0",
     "$defs": {"40": {}} | {f"{n}": {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)}},
]  # fmt: skip


def test_hostile_schemas_hold_up_nobody(gateway: Running) -> None:
    with gateway.client(timeout=60) as client, ThreadPoolExecutor(1) as other:
        attack = other.submit(lambda: [asked(client, schema) for schema in HOSTILE])
        slowest = 0.0
        while not attack.done():
            start = time.monotonic()
            client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=4)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.05)
        attack.result()
        assert slowest < 3, "requests without a schema go on"
        assert asked(client, {"type": "object"}) == "", "and so do those with one"


@pytest.mark.slow  # the worker of grammars takes seconds to start
def test_a_worker_that_was_killed_while_idle_is_replaced(gateway: Running, client: openai.OpenAI) -> None:
    """As by the kernel, when memory is short: the next template and the next grammar are not to blame."""
    assert asked(client, {"enum": ["before"]}) == ""
    threads = Path(f"/proc/{gateway.child.pid}/task").iterdir()
    workers = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    assert len(workers) >= 2, "of the chat template and of the grammars"
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    time.sleep(0.2)
    assert asked(client, {"enum": ["after"]}) == ""
