"""A conversation's request as what its template gets, and as the rules by which its answer is read."""

from __future__ import annotations

from collections.abc import Mapping

from builder.gateway import requests, tools
from builder.gateway.generation import TextRules
from builder.gateway.parsers import AnswerParser
from builder.gateway.prompts import Conversation
from builder.gateway.reasoning import Reasoning
from builder.gateway.requests import ChatRequest
from builder.gateway.settings import Model
from builder.gateway.tool_calls import ToolCalls


def conversation(asked: ChatRequest, model: Model) -> Conversation:
    """The conversation of a request. ApiError for a variable that a request can't set."""
    return Conversation(
        [message.for_template() for message in asked.messages],
        [tool.sent for tool in tools.used(asked.tools, asked.tool_choice)],
        requests.template_variables(asked),
        continue_final=asked.continue_final_message,
        forced=_forced(asked, model),
    )


def text_rules(asked: ChatRequest, model: Model, *, opened: bool) -> TextRules:
    """How the answer is read. `opened`: the prompt ends within the reasoning."""
    names = [tool.function.name for tool in tools.used(asked.tools, asked.tool_choice)]
    forced = _forced(asked, model)
    reasons = model.reasoning if opened or not (asked.continue_final_message or forced) else None
    if asked.response_format and asked.response_format.guides:  # from its first token on the answer is JSON, or a call
        reasons = None
    calls = model.tool_calls if names else None
    if not reasons and not calls:
        return TextRules(asked.stops, tokens=kept_tokens(model))

    def parser() -> AnswerParser:
        return AnswerParser(
            Reasoning(reasons, opened=opened) if reasons else None,
            ToolCalls(calls, names, single=not asked.parallel_tool_calls) if calls else None,
            forced=forced,
        )

    marks = [*(calls.tokens if calls else ()), *((reasons.opening, reasons.closing) if reasons else ())]
    kept = {model.special_tokens[mark]: mark for mark in marks if mark in model.special_tokens}
    return TextRules(asked.stops, parser, {**kept_tokens(model), **kept})


def kept_tokens(model: Model) -> Mapping[int, str]:
    """The special tokens that have a text in every answer: none, or all but the model's end ids, as the recipe says."""
    if model.texts.skip_special_tokens:
        return {}
    return {id: text for text, id in model.special_tokens.items() if id not in model.end_ids}


def _forced(asked: ChatRequest, model: Model) -> str:
    """The beginning of the answer, if the request demands a tool call."""
    name = tools.function_to_call(asked.tools, asked.tool_choice)
    return model.tool_calls.forced(name or None) if name is not None and model.tool_calls else ""
