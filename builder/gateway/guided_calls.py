"""Answers with tool calls that a grammar guides: those that must call a function, and those with strict functions."""

from __future__ import annotations

from builder.gateway import tools
from builder.gateway.errors import ApiError, invalid
from builder.gateway.guided import Guides
from builder.gateway.requests import ChatRequest
from builder.gateway.settings import Model
from builder.gateway.tools import Choice
from builder.grammar.guides import Guide
from builder.grammar.tool_calls import Answer, Form, Function


def check(asked: ChatRequest, model: Model) -> None:
    """ApiError if the request asks for strict functions, or for functions beside a form of the answer, and this model
    can't have them. Called for requests that pass the other checks."""
    if (_strict(asked) or _formed(asked)) and (why := _why_not(asked, model)):
        raise why


async def guide(asked: ChatRequest, model: Model, guides: Guides, *, opened: bool) -> Guide | None:
    """The guide of a conversation's answer; None if it is free. `opened`: the prompt ends within the reasoning.

    ApiError for a schema that can't be used.
    """
    if not _offered(asked) or model.tool_calls is None:
        return await guides.of(asked.response_format)
    called, demanded = _called(asked), _strict(asked) or _formed(asked)
    if called is None and not demanded:
        return None
    if why := _why_not(asked, model, opened=opened):
        if demanded:
            raise why
        return None
    form = _form(model)
    functions = [
        Function(one.function.name, one.function.parameters or {}, bool(one.function.strict))
        for one in _offered(asked)
        if called in (None, "", one.function.name)
    ]
    one_call = isinstance(asked.tool_choice, Choice) or not asked.parallel_tool_calls
    answer = Answer(
        begun="" if called is None else "arguments" if called else "name",
        many=not one_call and not _special(model, form.between),
        reasoning=_reasoning(model) if called is None else None,
        opened=opened,
    )
    return await guides.calls(functions, form, answer, asked.response_format if _formed(asked) else None)


def _why_not(asked: ChatRequest, model: Model, *, opened: bool = False) -> ApiError | None:
    """Why no grammar can guide the answer, which may have calls."""
    called, form, param = _called(asked), _form(model), "response_format" if _formed(asked) else "tools"
    if model.guided is None:
        return _unsupported("This server has no guided decoding: omit strict from the functions.", param)
    for name in ("ignore_eos", "min_tokens"):
        if getattr(asked, name):
            return invalid(f"{name} can't be combined with strict functions: a complete answer ends.", name)
    if _formed(asked) and form.bare:
        return _unsupported(
            "response_format can't be combined with tools: this model writes calls as JSON, too. tool_choice none "
            "omits them.", param,
        )  # fmt: skip
    needed = {None: form.before, "": () if form.key else ("[ARGS]",)}.get(called, ())
    if opened and called is None and model.reasoning:
        needed = (*needed, model.reasoning.closing)
    if _special(model, needed):
        return _unsupported(
            "This model writes calls with special tokens, which a grammar can't have: omit strict and response_format, "
            "or let tool_choice name a function.", param,
        )  # fmt: skip
    return None


def _unsupported(message: str, param: str) -> ApiError:
    return invalid(message, param, "unsupported_parameter")


def _offered(asked: ChatRequest) -> list[tools.Tool]:
    return tools.used(asked.tools, asked.tool_choice)


def _called(asked: ChatRequest) -> str | None:
    return tools.function_to_call(asked.tools, asked.tool_choice)


def _strict(asked: ChatRequest) -> bool:
    """Whether a strict function can be called."""
    called = _called(asked)
    return any(one.function.strict for one in _offered(asked) if called in (None, "", one.function.name))


def _formed(asked: ChatRequest) -> bool:
    """Whether an answer without calls, if there can be one, has a form."""
    form = asked.response_format
    return form is not None and form.guides and bool(_offered(asked)) and _called(asked) is None


def _form(model: Model) -> Form:
    assert model.tool_calls is not None
    return model.tool_calls.grammar(model.special_tokens)


def _special(model: Model, marks: tuple[str, ...]) -> bool:
    return any(mark in model.special_tokens for mark in marks)


def _reasoning(model: Model) -> tuple[str, str] | None:
    """The model's reasoning, unless its marks are special tokens."""
    form = model.reasoning
    if form is None or _special(model, (form.opening, form.closing)):
        return None
    return form.opening, form.closing
