"""OpenAI's JSON objects for answers: whole ones, and the events of a stream.

Events are written with a few string operations, because there is one for each token. Tests read all of them with the
openai package's types.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from builder.gateway.generation import Answer, Token
from builder.gateway.text_parts import Part
from builder.tokenizer.detokenizer import Vocabulary

DONE = b"data: [DONE]\n\n"
EMPTY = Part("content", "")


@dataclass(frozen=True)
class Usage:
    """The number of tokens of a request's prompts, of its answers, and of the reasoning in them."""

    prompt: int
    completion: int
    reasoning: int = 0

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Reply(Protocol):
    """The JSON of one request's answers: a whole response, or the events of a stream in the order of these methods."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response of a request that is not streamed. `answers`: one for each choice."""

    def start(self, index: int) -> bytes:
        """The events before a choice's first piece; b"" if there are none."""

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> bytes:
        """The events of a part of the answer."""

    def end(self, index: int, answer: Answer) -> bytes:
        """The events at the end of a choice."""

    def last(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The events after all choices."""


class Choices:
    """A reply with choices (see Reply). Subclasses say how a choice looks.

    usage: whether a stream ends with an event that has the usage (stream_options.include_usage).
    """

    KIND = EVENT_KIND = ""

    def __init__(self, id: str, created: int, model: str, vocabulary: Vocabulary, *, usage: bool, log_probs: bool):
        self._common = {"id": id, "created": created, "model": model}
        self._vocabulary, self._usage, self._log_probs = vocabulary, usage, log_probs
        head = json.dumps({**self._common, "object": self.EVENT_KIND})
        self._head = f'data: {head[:-1]}, "choices": ['
        self._tail = '], "usage": null}\n\n' if usage else "]}\n\n"

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response of a request that is not streamed. `answers`: one for each choice."""
        choices = [
            {
                "index": index,
                **self._content(answer),
                "logprobs": self._logprobs(answer.log_probs),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._common, "object": self.KIND, "choices": choices, "usage": usage.as_dict()}

    def start(self, index: int) -> bytes:
        """The event before a choice's first piece; b"" if there is none."""
        return b""

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> bytes:
        """The event of a part of the answer."""
        return self._event(index, self._delta(part), tokens, "null")

    def end(self, index: int, answer: Answer) -> bytes:
        """The event at the end of a choice."""
        return self._event(index, self._delta(EMPTY), (), json.dumps(answer.finish_reason))

    def last(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The events after all choices: the usage, if it was requested, and the mark of the end."""
        if not self._usage:
            return DONE
        return f'{self._head}], "usage": {json.dumps(usage.as_dict())}}}\n\n'.encode() + DONE

    def _event(self, index: int, delta: str, tokens: Sequence[Token], finish_reason: str) -> bytes:
        log_probs = json.dumps(self._logprobs(tokens)) if tokens else "null"
        choice = f'{{"index": {index}, {delta}, "logprobs": {log_probs}, "finish_reason": {finish_reason}}}'
        return f"{self._head}{choice}{self._tail}".encode()

    def _content(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, part: Part) -> str:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatReply(Choices):
    """For /v1/chat/completions."""

    KIND, EVENT_KIND = "chat.completion", "chat.completion.chunk"

    def start(self, index: int) -> bytes:
        """The event with the role."""
        return self._event(index, '"delta": {"role": "assistant", "content": ""}', (), "null")

    def _content(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = "".join(answer.reasoning)
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.name, "arguments": "".join(call.arguments)}}
                for call in answer.calls
            ]  # fmt: skip
        return {"message": message}

    def _delta(self, part: Part) -> str:
        kind, text = part.kind, part.text
        if kind == "content":
            return f'"delta": {{"content": {json.dumps(text)}}}' if text else '"delta": {}'
        if kind == "reasoning":
            return f'"delta": {{"reasoning_content": {json.dumps(text)}}}'
        call: dict[str, Any] = {"index": part.number, "function": {"arguments": text}}
        if kind == "call":
            call |= {"id": part.id, "type": "function", "function": {"name": text, "arguments": ""}}
        return f'"delta": {json.dumps({"tool_calls": [call]} if kind != "dropped" else {})}'

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._log_probs:
            return None
        content = []
        for token in tokens:
            raw = self._vocabulary.token_bytes(token.id)
            text = raw.decode("utf-8", "replace")
            content.append({"token": text, "logprob": token.log_prob, "bytes": list(raw), "top_logprobs": []})
        return {"content": content, "refusal": None}


class CompletionReply(Choices):
    """For /v1/completions."""

    KIND = EVENT_KIND = "text_completion"

    def _content(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text}

    def _delta(self, part: Part) -> str:
        return f'"text": {json.dumps(part.text)}'

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._log_probs:
            return None
        return {
            "tokens": [self._vocabulary.token_bytes(token.id).decode("utf-8", "replace") for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": None,
            "text_offset": [token.offset for token in tokens],
        }
