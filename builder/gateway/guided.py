"""Answers that follow a grammar: those with a response_format, and those that call functions (guided_calls.py).

A schema becomes a grammar here (builder.grammar), and a worker process compiles the grammar within limits before the
engine gets it: an engine compiles it in the loop that serves everyone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from builder.core import workers
from builder.gateway.errors import ApiError, invalid
from builder.gateway.settings import Guided, Model
from builder.gateway.turns import Turns, completed
from builder.grammar import json_schema, tool_calls
from builder.grammar.errors import GrammarError
from builder.grammar.guides import Guide
from builder.grammar.tool_calls import Answer, Form, Function
from builder.tokenizer import chat_template

LARGEST = 64 << 10  # characters of a schema
LARGEST_GRAMMAR = 1 << 20  # characters
COMPILE_SECONDS, START_SECONDS = 5.0, 120.0
REMEMBERED = 256  # grammars that were compiled


class JsonSchema(BaseModel):
    """A named schema. Only `schema` and `strict` have an effect."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(max_length=256)] = ""
    description: str | None = None
    content: Annotated[dict[str, Any] | bool, Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    _param: str = PrivateAttr("response_format")

    @property
    def param(self) -> str:
        """The field of the request that has it, for messages."""
        return self._param

    @property
    def content(self) -> tuple[Any, bool]:
        """The schema, and whether all of it must be fulfilled."""
        if self.json_schema is None or self.type == "json_object":
            return {"type": "object"}, False
        return self.json_schema.content, bool(self.json_schema.strict)

    @property
    def guides(self) -> bool:
        """Whether a grammar guides the answer."""
        return self.type != "text"


class Asked(Protocol):
    """What is looked at of a request."""

    response_format: ResponseFormat | None
    ignore_eos: bool
    min_tokens: int


def check(request: Asked, model: Model) -> None:
    """ApiError if this request and this model can't have a grammar."""
    form = request.response_format
    if form is None:
        return
    if model.guided is None:
        raise invalid(f"This server has no guided decoding: omit {form.param}.", form.param, "unsupported_parameter")
    if form.type == "json_schema" and not form.json_schema:
        raise invalid(f"{form.param}.json_schema is missing.", form.param)
    for name in ("ignore_eos", "min_tokens"):
        if getattr(request, name):
            raise invalid(f"{name} can't be combined with {form.param}: a complete answer ends.", name)


def _bounded(functions: Sequence[Function]) -> Sequence[Function]:
    """Those functions; if their schemas are too large to be worked on, without those that need not be followed."""
    sizes = [len(json.dumps(one.parameters)) for one in functions]
    if max(sizes) <= LARGEST and sum(sizes) <= LARGEST_GRAMMAR:
        return functions
    return [one if one.strict else replace(one, parameters={}) for one in functions]


def _checked_size(schema: Any, param: str) -> int:
    """The characters of a schema. ApiError if it is too large."""
    size = len(json.dumps(schema))
    if size > LARGEST:
        raise invalid(f"The schema has {size} characters; at most {LARGEST} are possible.", param, "schema_too_large")
    return size


class Guides:
    """Makes the guides of one model's answers. `close` ends the worker process."""

    def __init__(self, model: Model) -> None:
        self._model = model
        # SHA-256 of a grammar, which may have a million characters -> why it can't be used; "" if it can
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._worker: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, "grammar")  # the worker compiles one grammar at a time
        self._turns = Turns("grammars")

    def close(self) -> None:
        """Ends the worker process."""
        self._thread.submit(self._stop).result()
        self._thread.shutdown()

    async def of(self, form: ResponseFormat | None) -> Guide | None:
        """The guide of a response_format. ApiError if it can't be used."""
        if form is None or not form.guides:
            return None
        content, strict = form.content
        size = _checked_size(content, form.param)
        async with self._turns.turn(size):
            return await self._made(lambda: json_schema.grammar(content, strict=strict), form.param)

    async def calls(
        self, functions: Sequence[Function], form: Form, answer: Answer, formed: ResponseFormat | None
    ) -> Guide:
        """The guide of an answer with calls of these functions. ApiError as for `of`. `formed`: the form of an answer
        without calls."""
        param = formed.param if formed else "tools"
        functions = _bounded(functions)
        size = sum(_checked_size(one.parameters, "tools") for one in functions)
        if size > LARGEST_GRAMMAR:
            message = f"The schemas have {size} characters; at most {LARGEST_GRAMMAR} are possible."
            raise invalid(message, "tools", "schema_too_large")
        if formed:
            content, strict = formed.content
            size += _checked_size(content, param)
            answer = replace(answer, content=content, strict_content=strict)
        async with self._turns.turn(size):
            try:
                return await self._made(lambda: tool_calls.grammar(functions, form, answer), param)
            except ApiError as error:
                if error.status != 400 or formed or any(one.strict for one in functions):
                    raise
            # What is not strict need not be followed: any object does, as without guided decoding.
            free = [replace(one, parameters={}) for one in functions]
            return await self._made(lambda: tool_calls.grammar(free, form, answer), param)

    async def _made(self, make: Callable[[], str], param: str) -> Guide:
        try:
            text = await completed(asyncio.to_thread(make))
        except (GrammarError, RecursionError) as error:
            raise invalid(f"The schema can't be used: {error}", param, "invalid_schema") from None
        return await self._checked(text, param)

    async def _checked(self, text: str, param: str) -> Guide:
        if len(text) > LARGEST_GRAMMAR:
            raise invalid("The schema is too complex.", param, "schema_too_large")
        key = hashlib.sha256(text.encode()).digest()
        why = self._verdicts.get(key)
        if why is None:
            work = asyncio.get_running_loop().run_in_executor
            why = await completed(work(self._thread, self._compile, text))
            self._verdicts[key] = why
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(key)
        if why:
            raise invalid(f"The schema can't be used: {why}", param, "invalid_schema")
        return Guide("ebnf_grammar", text)

    def _compile(self, text: str) -> str:
        """In the thread: why the grammar can't be used, or "". ApiError if there is no compiler."""
        if self._worker is not None and self._worker.poll() is not None:  # it died while idle: not this grammar's fault
            self._stop()
        if self._worker is None:
            self._worker = self._start()
        assert self._worker.stdin is not None
        try:
            self._worker.stdin.write(json.dumps({"kind": "ebnf_grammar", "text": text}).encode() + b"\n")
            self._worker.stdin.flush()
            response = chat_template.read_response(self._worker, wall=COMPILE_SECONDS)
        except BrokenPipeError:
            response = {"error": "crashed", "why": "its process exited"}
        if response.get("error") in ("endless", "crashed"):
            self._stop()
            return "compiling it takes too long or too much memory"
        return str(response.get("why", ""))

    def _start(self) -> subprocess.Popen[bytes]:
        guided: Guided | None = self._model.guided
        assert guided is not None
        arguments = (str(guided.file.absolute()), str(self._model.vocab_size))
        worker = chat_template.start_worker(workers.GRAMMAR, *arguments, stdin=subprocess.PIPE)
        response = chat_template.read_response(worker, wall=START_SECONDS)
        if "error" in response:
            worker.kill()
            worker.communicate()
            raise ApiError(
                500, "This server can't compile grammars.", code="guided_decoding_unavailable", detail=response["why"]
            )
        return worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None
