"""Conversations and texts to token ids. Neither blocks the event loop: a template runs in a worker process, and a long
text is tokenized in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from builder.gateway.chat_forms import ReasoningForm
from builder.gateway.errors import ApiError, invalid
from builder.gateway.settings import Model
from builder.gateway.turns import Turns, completed
from builder.tokenizer.chat_template import Renderer, TemplateProblem
from builder.tokenizer.control_tokens import ControlTokens
from builder.tokenizer.special_tokens import prefix_ids, without_repeated_prefix

LONG = 8192  # characters that take a few milliseconds to tokenize
RESERVED = ("messages", "add_generation_prompt", "today", "tools", "self")  # what a template gets from elsewhere


@dataclass(frozen=True)
class Conversation:
    """What a chat template gets. variables: additional ones. continue_final: the model continues the last message.
    forced: a text that the answer begins with, which is not the model's choice."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    forced: str = ""


class Prompt(NamedTuple):
    """Token ids, and whether they end within the model's reasoning."""

    ids: list[int]
    opened: bool


class Prompts:
    """Makes prompts for one model. `close` ends the worker process."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer = model.vocabulary.tokenizer
        self._control_tokens = ControlTokens(self._tokenizer)
        self._prefix = prefix_ids(self._encode)
        # A text with more characters can't fit, so it is rejected without being tokenized.
        self._longest = model.max_input_len * max(len(token) for token in self._tokenizer.get_vocab())
        self._renderer: Renderer | None = None
        self._thread = ThreadPoolExecutor(1, "chat-template")  # a template renders one conversation at a time
        self._turns = Turns("the chat template")

    def close(self) -> None:
        """Ends the worker process."""
        self._thread.submit(self._stop).result()
        self._thread.shutdown()

    async def conversation(self, talk: Conversation, size: int) -> Prompt:
        """The prompt of a conversation up to where the assistant answers. ApiError if the template rejects it.

        size: the bytes of the request, all of which its template may get. Larger ones let smaller ones go first.
        """
        if self._model.template is None:
            raise invalid("This model has no chat template. Use /v1/completions.", "messages")
        mark = ""
        if self._model.texts.parse_special_tokens != "everywhere":
            talk, mark = self._protected(talk)
        work = asyncio.get_running_loop().run_in_executor
        try:
            async with self._turns.turn(size):
                text = await completed(work(self._thread, self._render, talk))
        except TemplateProblem as problem:
            message = f"The model's chat template {problem}".replace(mark, "")
            # Only a template that rejects the conversation, or needs too much for it, is the client's matter.
            raise ApiError(400 if problem.kind != "syntax" else 500, message, param="messages") from None
        reasoning = self._model.reasoning
        opened = reasoning is not None and _open(text, reasoning, continued=talk.continue_final)
        if talk.forced:
            text += f"\n{reasoning.closing}\n\n{talk.forced}" if opened and reasoning else talk.forced
            opened = False
        return Prompt(await self._tokens(text, "messages", mark), opened)

    async def text(self, text: str, param: str) -> list[int]:
        """The token ids of a text. ApiError, about `param`, if it is empty, too long or has an unknown token."""
        mark = ""
        if self._model.texts.parse_special_tokens == "never":
            text, mark = self._protect(text, param)
        return await self._tokens(text, param, mark)

    def _protected(self, talk: Conversation) -> tuple[Conversation, str]:
        value = {"messages": list(talk.messages), "tools": list(talk.tools), "variables": dict(talk.variables)}
        found, mark = self._protect(value, "messages")
        return (replace(talk, **found) if mark else talk), mark

    def _protect(self, value: Any, param: str) -> tuple[Any, str]:
        try:
            return self._control_tokens.protect(value)
        except (ValueError, RecursionError) as error:
            raise invalid(f"The text can't be tokenized: {error}.", param) from None

    async def _tokens(self, text: str, param: str, mark: str) -> list[int]:
        """The ids of a text in which `mark` breaks the control tokens that a client wrote."""
        if len(text) > self._longest:
            raise self._too_long(f"{len(text)} characters", param)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            raise invalid(f"The prompt is not valid Unicode at character {error.start}.", param) from None
        ids = await asyncio.to_thread(self._encode, text, mark) if len(text) > LONG else self._encode(text, mark)
        return self.ids(without_repeated_prefix(ids, self._prefix), param)

    def ids(self, ids: list[int], param: str) -> list[int]:
        """The ids, if they can be a prompt. ApiError if not."""
        if not ids:
            raise invalid("The prompt is empty.", param)
        if len(ids) > self._model.max_input_len:
            raise self._too_long(f"{len(ids)} tokens", param)
        if not 0 <= min(ids) <= max(ids) < self._model.vocab_size:
            raise invalid(f"The prompt has a token that is not among the model's {self._model.vocab_size}.", param)
        return ids

    def _too_long(self, length: str, param: str) -> ApiError:
        return invalid(
            f"The prompt has {length}; this model takes {self._model.max_input_len} tokens (max_input_len).",
            param, "context_length_exceeded",
        )  # fmt: skip

    def _encode(self, text: str, mark: str = "") -> list[int]:
        adds = self._model.texts.add_special_tokens
        if mark:
            return self._control_tokens.encode(text, mark, add_special_tokens=adds)
        return list(self._tokenizer.encode(text, add_special_tokens=adds).ids)

    def _render(self, talk: Conversation) -> str:
        """In the thread: renders with the running worker, or a new one."""
        assert self._model.template is not None
        variables = {**talk.variables, "today": datetime.now().isoformat()}
        if talk.tools:
            variables["tools"] = list(talk.tools)
        if self._renderer is not None and self._renderer.ended:  # while idle: not this conversation's fault
            self._stop()
        try:
            if self._renderer is None:
                self._renderer = Renderer(self._model.template).__enter__()
            if talk.continue_final:
                return self._renderer.render_open(talk.messages, **variables)
            return self._renderer.render(talk.messages, add_generation_prompt=True, **variables)
        except TemplateProblem as problem:
            if problem.kind in ("endless", "memory", "crashed", "syntax"):  # its process has ended, or is about to
                self._stop()
            raise
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        if self._renderer is not None:
            self._renderer.__exit__()
            self._renderer = None


def _open(text: str, form: ReasoningForm, *, continued: bool) -> bool:
    """Whether a prompt ends within reasoning: right after its opening, or in a message that is continued."""
    if continued:
        return text.rfind(form.opening) > text.rfind(form.closing)
    return text.rstrip().endswith(form.opening)
