"""The parsers of an answer's text, one behind the other: its reasoning first, then the tool calls in the rest."""

from __future__ import annotations

from builder.gateway.reasoning import Reasoning
from builder.gateway.text_parts import Part
from builder.gateway.tool_calls import ToolCalls


class AnswerParser:
    """Divides an answer into reasoning, content and tool calls; there may be no parser for either."""

    def __init__(self, reasoning: Reasoning | None, calls: ToolCalls | None, *, forced: str = "") -> None:
        """`forced`: the beginning of a tool call that ends the prompt, so the answer continues it."""
        self._reasoning, self._calls = reasoning, calls
        if calls and forced:
            calls.add(forced)

    @property
    def held(self) -> int:
        """The number of characters that are held back."""
        return sum(parser.held for parser in (self._reasoning, self._calls) if parser)

    @property
    def ended(self) -> bool:
        """Whether no more text is wanted."""
        return bool(self._calls and self._calls.ended)

    @property
    def reasoning(self) -> bool:
        """Whether the text is within the reasoning."""
        return bool(self._reasoning and self._reasoning.found and not self._reasoning.ended)

    def add(self, text: str) -> list[Part]:
        """The parts that are known now."""
        if not text:
            return []
        return self._next(self._reasoning.add(text) if self._reasoning else [Part("content", text)])

    def rest(self) -> list[Part]:
        """What was held back when the answer ended."""
        parts = self._next(self._reasoning.rest() if self._reasoning else [])
        return parts + (self._calls.rest() if self._calls else [])

    def _next(self, parts: list[Part]) -> list[Part]:
        if not self._calls:
            return parts
        found = []
        for part in parts:
            found += self._calls.add(part.text) if part.kind == "content" else [part]
        return found
