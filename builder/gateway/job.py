"""The answers of one request: each choice is a generation of its own, and all run at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace

from builder.gateway.engine import Engine
from builder.gateway.errors import ApiError
from builder.gateway.generation import Answer, TextRules, Token, generate
from builder.gateway.limits import Limits
from builder.gateway.record import Record
from builder.gateway.responses import Reply, Usage
from builder.gateway.settings import Model
from builder.gateway.streams import Outbox
from builder.gateway.tensors import TokenRequest
from builder.gateway.text_parts import Part


class Admission:
    """Counts the answers that were asked for and have not ended, and the bytes of requests, and refuses more than the
    limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.in_progress = self._bytes = 0

    def enter(self, answers: int) -> None:
        """Admits so many answers, until `leave`. ApiError (429) if there are too many."""
        if self.in_progress + answers > self._limits.requests:
            raise ApiError(
                429, f"The server is busy with {self.in_progress} answers. Try again later.", code="too_many_requests"
            )
        self.in_progress += answers

    def leave(self, answers: int) -> None:
        """They have ended, in whatever way."""
        self.in_progress -= answers

    def keep(self, size: int) -> None:
        """Counts bytes of a request, until `forget`. ApiError (429) if there are too many, also counted."""
        self._bytes += size
        if self._bytes > self._limits.bodies:
            raise ApiError(429, "The server is busy with large requests. Try again later.", code="too_many_bytes")

    def forget(self, size: int) -> None:
        """A request with so many bytes has ended."""
        self._bytes -= size


@dataclass(frozen=True)
class Job:
    """A validated request. prompts: one TokenRequest each. n: answers of each prompt. echoes: text to put before the
    answers of each prompt."""

    reply: Reply
    prompts: Sequence[TokenRequest]
    n: int
    rules: TextRules
    echoes: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompts) * self.n


class Jobs:
    """Runs jobs on one engine, within the limit of time."""

    def __init__(self, engine: Engine, model: Model, limits: Limits) -> None:
        self._engine, self._model, self._limits = engine, model, limits

    async def whole(self, job: Job, record: Record) -> dict[str, object]:
        """The response's JSON object, once all answers are complete."""
        answers = await self._run(job, record, None)
        for index, answer in enumerate(answers):
            answer.pieces.insert(0, job.echoes[index // job.n])
        return job.reply.whole(answers, self._usage(job, answers))

    async def stream(self, job: Job, record: Record, outbox: Outbox) -> None:
        """Puts the events of all answers into the outbox."""
        answers = await self._run(job, record, outbox)
        outbox.put(job.reply.last(answers, self._usage(job, answers)))

    async def _run(self, job: Job, record: Record, outbox: Outbox | None) -> list[Answer]:
        answers: list[Answer] = []
        record.prompt_tokens = sum(len(prompt.ids) for prompt in job.prompts)
        try:
            async with asyncio.timeout(self._limits.seconds):
                if len(job) == 1:
                    answers = [await self._answer(job, 0, record, outbox)]
                else:
                    answers = await _all([self._answer(job, i, record, outbox) for i in range(len(job))])
        except TimeoutError:
            message = f"The answer took longer than {self._limits.seconds:.0f} s."
            raise ApiError(504, message, code="timeout") from None
        record.finish_reasons = [answer.finish_reason for answer in answers]
        return answers

    async def _answer(self, job: Job, index: int, record: Record, outbox: Outbox | None) -> Answer:
        prompt = job.prompts[index // job.n]
        sampling = replace(prompt.sampling, seed=(prompt.sampling.seed + index % job.n) % (1 << 64))
        started = False
        if outbox is None:

            def emit(part: Part, tokens: Sequence[Token]) -> None:
                record.token()
        else:

            def emit(part: Part, tokens: Sequence[Token]) -> None:
                nonlocal started
                if not started:
                    started = True
                    record.token()
                    self._start(job, index, outbox)
                outbox.put(job.reply.piece(index, part, tokens))

        request = replace(prompt, sampling=sampling)
        # A new id, not the client's: the engine stops answers by id, and two clients may send the same one.
        answer = await generate(self._engine, self._model, request, job.rules, uuid.uuid4().hex, emit)
        record.completion_tokens += answer.tokens
        if outbox is not None:
            if not started:  # an empty answer
                self._start(job, index, outbox)
            outbox.put(job.reply.end(index, answer))
        return answer

    def _start(self, job: Job, index: int, outbox: Outbox) -> None:
        outbox.put(job.reply.start(index))
        if echo := job.echoes[index // job.n]:
            outbox.put(job.reply.piece(index, Part("content", echo), ()))

    def _usage(self, job: Job, answers: Sequence[Answer]) -> Usage:
        prompt = sum(len(prompt.ids) for prompt in job.prompts)
        reasoning = sum(answer.reasoning_tokens for answer in answers)
        return Usage(prompt, sum(answer.tokens for answer in answers), reasoning)


async def _all(coroutines: Sequence[Coroutine[None, None, Answer]]) -> list[Answer]:
    """The results of all; if one fails or this task is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
