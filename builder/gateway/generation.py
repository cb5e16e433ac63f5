"""One answer: the engine's tokens become pieces of text that end at end ids and stop strings.

Text passes through detokenizer and stop strings in this order. Whatever else must see an answer's text before the
client does (tool calls, reasoning parts) belongs behind the stop strings, as a further object with `add` and `rest`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from builder.gateway.engine import Engine
from builder.gateway.settings import Model
from builder.gateway.stops import StopStrings
from builder.gateway.tensors import Step, TokenRequest
from builder.tokenizer.detokenizer import Detokenizer


class Token(NamedTuple):
    """A generated token with its log-probability, and where its text starts in the answer."""

    id: int
    log_prob: float
    offset: int


Emit = Callable[[str, Sequence[Token]], None]  # new text, and the tokens that it was made from


@dataclass
class Answer:
    """A finished or unfinished answer. finish_reason: "stop" or "length"; "" while it is in progress.

    tokens: how many were generated, without the end token. log_probs: of the tokens, if they were requested.
    """

    pieces: list[str] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str = ""
    log_probs: list[Token] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


async def generate(
    engine: Engine, model: Model, request: TokenRequest, stop: Sequence[str], request_id: str, emit: Emit
) -> Answer:
    """Generates one answer and passes each new piece of text to `emit`, which must not block. ApiError if it fails."""
    progress = _Progress(model, request, StopStrings(stop), emit)
    await engine.generate(request, request_id, progress.add)
    return progress.answer


class _Progress:
    """The state of an answer between two responses."""

    def __init__(self, model: Model, request: TokenRequest, stops: StopStrings, emit: Emit) -> None:
        self.answer = Answer()
        self._model, self._request, self._stops, self._emit = model, request, stops, emit
        self._detokenizer = Detokenizer(model.vocabulary)
        self._end_ids = frozenset(request.end_ids)
        self._length = self._sent = 0  # characters before and after stop strings
        self._unsent: list[Token] = []

    def add(self, step: Step) -> bool:
        """Adds a response. Whether more are wanted: the engine stops at end ids by itself, but not at stop strings."""
        ended = self._add_ids(step) if step.ids else False
        if step.text:
            self._send(step.text)
        if self._stops.matched is not None or ended:
            self._finish("stop")
        elif step.final:
            reached = self.answer.tokens >= self._request.max_tokens
            self._finish(step.reason or ("length" if reached else "stop"))
        return not self.answer.finish_reason

    def _add_ids(self, step: Step) -> bool:
        """Adds token ids. Whether one of them ends the answer."""
        for position, id in enumerate(step.ids):
            if id in self._end_ids:
                return True
            self.answer.tokens += 1
            if step.log_probs:
                self._unsent.append(Token(id, step.log_probs[position], self._length))
            self._send(self._detokenizer.add((id,)))
            if self._stops.matched is not None:
                return True
        return False

    def _send(self, text: str) -> None:
        self._length += len(text)
        self._pass_on(self._stops.add(text) if text else "")

    def _pass_on(self, text: str) -> None:
        if text:
            self.answer.pieces.append(text)
            self._sent += len(text)
            sent = [token for token in self._unsent if token.offset < self._sent]
            self._unsent = self._unsent[len(sent) :]
            self.answer.log_probs += sent
            self._emit(text, sent)

    def _send_tokens(self) -> None:
        """Passes on the tokens at the end that have no text: special ones, and parts of a character."""
        if self._unsent:
            self.answer.log_probs += self._unsent
            self._emit("", self._unsent)

    def _finish(self, reason: str) -> None:
        if self._stops.matched is None:
            if not self._model.llmapi:
                self._send(self._detokenizer.rest())
            if self._stops.matched is None:
                self._pass_on(self._stops.rest())
                self._send_tokens()
        if self._model.llmapi:  # that model does not count tokens
            self.answer.tokens = len(
                self._model.vocabulary.tokenizer.encode(self.answer.text, add_special_tokens=False).ids
            )
        self.answer.finish_reason = "length" if reason == "length" and self._stops.matched is None else "stop"
