"""Separates the reasoning at the start of an answer from the answer itself, across the borders of pieces of text."""

from __future__ import annotations

from builder.gateway.chat_forms import ReasoningForm
from builder.gateway.text_parts import Part, beginning_at_end
from builder.grammar.tool_calls import SPACE


class Reasoning:
    """Reads an answer. `opened`: the prompt ends within the reasoning, so the answer begins in it.

    White space around the reasoning is dropped: what grammars take for it, so a call is found where they allow one. A
    reasoning that does not end is the whole answer. An answer that does not begin with the opening text has none,
    whatever follows.
    """

    def __init__(self, form: ReasoningForm, *, opened: bool) -> None:
        self._form = form
        self._held = ""
        self._within: bool | None = opened or None  # None: not known yet
        self._fresh = True  # nothing but white space since the last border
        self.found = opened

    @property
    def held(self) -> int:
        """The number of characters that are held back."""
        return len(self._held)

    @property
    def ended(self) -> bool:
        """Whether the reasoning, if there was one, is over."""
        return self._within is False

    def add(self, text: str) -> list[Part]:
        """The parts that are known now."""
        text, self._held = self._held + text, ""
        if self._within is None:
            return self._first(text)
        return self._inside(text) if self._within else self._outside(text)

    def rest(self) -> list[Part]:
        """What was held back when the answer ended."""
        held, self._held = self._held, ""
        if self._within:
            return self._part("reasoning", held.rstrip(SPACE))
        return self._part("content", held)

    def _first(self, text: str) -> list[Part]:
        start, opening = text.lstrip(SPACE), self._form.opening
        if start.startswith(opening):
            self._within = self.found = True
            return self._inside(start[len(opening) :])
        if opening.startswith(start):
            self._held = text
            return []
        self._within, self._fresh = False, False
        return self._part("content", text)

    def _inside(self, text: str) -> list[Part]:
        if self._fresh:
            text = text.lstrip(SPACE)
        self._fresh = self._fresh and not text
        before, found, after = text.partition(self._form.closing)
        if found:
            self._within, self._fresh = False, True
            return self._part("reasoning", before.rstrip(SPACE)) + self._outside(after)
        known = text[: len(text) - beginning_at_end(text, (self._form.closing,))].rstrip(SPACE)
        self._held = text[len(known) :]
        return self._part("reasoning", known)

    def _outside(self, text: str) -> list[Part]:
        if self._fresh:
            text = text.lstrip(SPACE)
            self._fresh = not text
        return self._part("content", text)

    def _part(self, kind: str, text: str) -> list[Part]:
        return [Part(kind, text)] if text else []
