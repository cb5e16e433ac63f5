"""One answer: the engine's tokens become pieces of text that end at end ids and stop strings.

Text passes through the detokenizer, then through the parser that divides it into reasoning, tool calls and content, if
there is one. Stop strings are matched in the content alone: reasoning and tool calls are not what a client stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from builder.gateway.engine import Engine
from builder.gateway.parsers import AnswerParser
from builder.gateway.settings import Model
from builder.gateway.stops import StopStrings
from builder.gateway.tensors import Step, TokenRequest
from builder.gateway.text_parts import Part
from builder.tokenizer.detokenizer import Detokenizer


class Token(NamedTuple):
    """A generated token with its log-probability, and where its text starts in the answer."""

    id: int
    log_prob: float
    offset: int


Emit = Callable[[Part, Sequence[Token]], None]  # a new part, and the tokens that it was made from


@dataclass(frozen=True)
class TextRules:
    """How an answer's text is read. stop: strings that end it. parser: makes the parser; None: all text is content.
    tokens: the special tokens that have a text, by id."""

    stop: Sequence[str] = ()
    parser: Callable[[], AnswerParser] | None = None
    tokens: Mapping[int, str] = field(default_factory=dict)


@dataclass
class ToolCall:
    """A call of a function. arguments: pieces of a JSON object."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """A finished or unfinished answer. finish_reason: "stop", "length" or "tool_calls"; "" while it is in progress.

    pieces: of the content. tokens: how many were generated, without the end token; reasoning_tokens: up to the end of
    the reasoning. log_probs: of the tokens, if they were requested.
    """

    pieces: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: int = 0
    reasoning_tokens: int = 0
    finish_reason: str = ""
    log_probs: list[Token] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(self.pieces)

    def add(self, part: Part) -> None:
        """Adds a part."""
        if part.kind == "content":
            self.pieces.append(part.text)
        elif part.kind == "reasoning":
            self.reasoning.append(part.text)
        elif part.kind == "call":
            self.calls.append(ToolCall(part.id, part.text))
        elif part.kind == "arguments":
            self.calls[-1].arguments.append(part.text)
        else:  # dropped
            self.calls.pop()


async def generate(
    engine: Engine, model: Model, request: TokenRequest, rules: TextRules, request_id: str, emit: Emit
) -> Answer:
    """Generates one answer and passes each new part to `emit`, which must not block. ApiError if it fails."""
    progress = _Progress(model, request, rules, emit)
    await engine.generate(request, request_id, progress.add)
    return progress.answer


class _Progress:
    """The state of an answer between two responses."""

    def __init__(self, model: Model, request: TokenRequest, rules: TextRules, emit: Emit) -> None:
        self.answer = Answer()
        self._model, self._request, self._emit, self._kept = model, request, emit, rules.tokens
        self._stops = StopStrings(rules.stop)
        self._parser = rules.parser() if rules.parser else None
        self._detokenizer = Detokenizer(model.vocabulary)
        self._end_ids = frozenset(request.end_ids)
        self._length = self._sent = 0  # characters that were generated, and those that were passed on
        self._unsent: list[Token] = []
        self._texts: list[str] = []  # of a model that does not return tokens

    def add(self, step: Step) -> bool:
        """Adds a response. Whether more are wanted: the engine stops at end ids by itself, but not at what ends a
        text."""
        ended = self._add_ids(step) if step.ids else False
        if step.text:
            self._texts.append(step.text)
            self._send(step.text)
        if ended or self._ended:
            self._finish("stop")
        elif step.final:
            reached = self.answer.tokens >= self._request.max_tokens
            self._finish(step.reason or ("length" if reached else "stop"))
        return not self.answer.finish_reason

    @property
    def _reasoning(self) -> bool:
        return self._parser is not None and self._parser.reasoning

    @property
    def _ended(self) -> bool:
        """Whether the text has ended before the model has."""
        return self._stops.matched is not None or (self._parser is not None and self._parser.ended)

    def _add_ids(self, step: Step) -> bool:
        """Adds token ids. Whether one of them ends the answer."""
        for position, id in enumerate(step.ids):
            if id in self._end_ids:
                return True
            self.answer.tokens += 1
            if step.log_probs:
                self._unsent.append(Token(id, step.log_probs[position], self._length))
            reasoning = self._reasoning
            if id in self._kept:
                self._send(self._detokenizer.rest() + self._kept[id])
                self._detokenizer = Detokenizer(self._model.vocabulary)
            else:
                self._send(self._detokenizer.add((id,)))
            if reasoning or self._reasoning:
                self.answer.reasoning_tokens = self.answer.tokens
            if self._ended:
                return True
        return False

    def _send(self, text: str) -> None:
        self._length += len(text)
        if self._parser is None:
            self._content(text)
        else:
            self._parts(self._parser.add(text))

    def _parts(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if part.kind == "content":
                self._content(part.text)
            elif self._stops.matched is None:
                if part.kind == "call":  # stop strings are not matched across it
                    self._pass_on(Part("content", self._stops.rest()))
                self._pass_on(part)

    def _content(self, text: str) -> None:
        self._pass_on(Part("content", self._stops.add(text) if text else ""))

    def _pass_on(self, part: Part) -> None:
        if not part.text and part.kind in ("content", "reasoning"):
            return
        self.answer.add(part)
        if self._parser is None or self._stops.matched is not None:
            self._sent += len(part.text)
        else:
            self._sent = self._length - self._parser.held - self._stops.held
        sent = [token for token in self._unsent if token.offset < self._sent]
        self._unsent = self._unsent[len(sent) :]
        self.answer.log_probs += sent
        self._emit(part, sent)

    def _send_tokens(self) -> None:
        """Passes on the tokens at the end that have no text: special ones, and parts of a character."""
        if self._unsent:
            self.answer.log_probs += self._unsent
            self._emit(Part("content", ""), self._unsent)

    def _finish(self, reason: str) -> None:
        if self._stops.matched is None:
            if not self._model.llmapi:
                self._send(self._detokenizer.rest())
            if self._parser is not None:
                self._parts(self._parser.rest())
            if self._stops.matched is None:
                self._pass_on(Part("content", self._stops.rest()))
                self._send_tokens()
        if self._model.llmapi:  # that model does not count tokens
            self.answer.tokens = self._count("".join(self._texts) if self._parser else self.answer.text)
            self.answer.reasoning_tokens = self._count("".join(self.answer.reasoning))
        stopped = reason != "length" or self._stops.matched is not None
        self.answer.finish_reason = "length" if not stopped else "tool_calls" if self.answer.calls else "stop"

    def _count(self, text: str) -> int:
        return len(self._model.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids) if text else 0
