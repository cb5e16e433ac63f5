"""Conversations and texts to token ids. Neither blocks the event loop: a template runs in a worker process, and a long
text is tokenized in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from builder.gateway.errors import ApiError, invalid
from builder.gateway.settings import Model
from builder.tokenizer.chat_template import Renderer, TemplateProblem
from builder.tokenizer.special_tokens import prefix_ids, without_repeated_prefix

LONG = 8192  # characters that take a few milliseconds to tokenize
RESERVED = ("messages", "add_generation_prompt", "today", "tools", "self")  # what a template gets from elsewhere


class Prompts:
    """Makes prompts for one model. `close` ends the worker process."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer = model.vocabulary.tokenizer
        self._prefix = prefix_ids(self._encode)
        # A text with more characters can't fit, so it is rejected without being tokenized.
        self._longest = model.max_input_len * max(len(token) for token in self._tokenizer.get_vocab())
        self._renderer: Renderer | None = None
        self._thread = ThreadPoolExecutor(1, "chat-template")  # a template renders one conversation at a time

    def close(self) -> None:
        """Ends the worker process."""
        self._thread.submit(self._stop).result()
        self._thread.shutdown()

    async def conversation(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, continue_final: bool = False
    ) -> list[int]:
        """The token ids of a conversation up to where the assistant answers. `variables`: of the template, additional
        ones. ApiError if the template rejects it."""
        if self._model.template is None:
            raise invalid("This model has no chat template. Use /v1/completions.", "messages")
        work = asyncio.get_running_loop().run_in_executor
        try:
            text = await work(self._thread, self._render, messages, continue_final, variables)
        except TemplateProblem as problem:
            message = f"The model's chat template {problem}"
            # Only a template that rejects the conversation, or needs too much for it, is the client's matter.
            raise ApiError(400 if problem.kind != "syntax" else 500, message, param="messages") from None
        return await self.text(text, "messages")

    async def text(self, text: str, param: str) -> list[int]:
        """The token ids of a text. ApiError, about `param`, if it is empty, too long or has an unknown token."""
        if len(text) > self._longest:
            raise self._too_long(f"{len(text)} characters", param)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            raise invalid(f"The prompt is not valid Unicode at character {error.start}.", param) from None
        ids = await asyncio.to_thread(self._encode, text) if len(text) > LONG else self._encode(text)
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

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _render(self, messages: Sequence[Mapping[str, Any]], continue_final: bool, variables: Mapping[str, Any]) -> str:
        """In the thread: renders with the running worker, or a new one."""
        assert self._model.template is not None
        variables = {**variables, "today": datetime.now().isoformat()}
        try:
            if self._renderer is None:
                self._renderer = Renderer(self._model.template).__enter__()
            if continue_final:
                return self._renderer.render_open(messages, **variables)
            return self._renderer.render(messages, add_generation_prompt=True, **variables)
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
