"""The routes: those of OpenAI's API under /v1, /health/live, /health/ready and /metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from builder.gateway import chat_rules, guided_calls, requests, routes
from builder.gateway.errors import ApiError, invalid
from builder.gateway.front import Front
from builder.gateway.generation import TextRules
from builder.gateway.job import Job
from builder.gateway.models import Models, Served
from builder.gateway.record import Metrics, Record
from builder.gateway.requests import ChatRequest, CompletionRequest
from builder.gateway.responses import ChatReply, Choices, CompletionReply, Reply
from builder.gateway.responses_reply import ResponsesReply
from builder.gateway.responses_request import ResponsesRequest
from builder.gateway.settings import Model, Place, Settings
from builder.gateway.streams import ClientGone, EventStream, left
from builder.gateway.telemetry import Traces
from builder.gateway.tensors import TokenRequest
from builder.gateway.watchdog import WatchdogCollector, Watched
from builder.grammar.guides import Guide


class _Prompts(NamedTuple):
    """The prompts of a request, the most tokens of an answer, how its text is read, its grammar, and what stands before
    it."""

    ids: Sequence[list[int]]
    limit: int | None
    rules: TextRules
    guide: Guide | None
    echoes: Sequence[str] = ("",)


class Gateway:
    """The application's state and its endpoints."""

    def __init__(self, settings: Settings, first: Sequence[tuple[Place, Model]]) -> None:
        self.settings, self._first = settings, first
        self.served = Models(settings.limits)

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Connects to the engines in the server's event loop, and closes the connections at the end."""
        await self.served.replace(self._first)
        following = asyncio.ensure_future(routes.follow(self.settings.routes, self.served))
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await self.served.close()

    def in_progress(self) -> float:
        """The number of answers in progress, for the metrics."""
        return self.served.admission.in_progress

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions."""
        asked = requests.parse(ChatRequest, await self._body(request), self._model)
        guided_calls.check(asked, self._model(asked.model))
        served = self._begin(request, asked.model, asked.n)
        reply = _reply(ChatReply, "chatcmpl-", asked, served)
        return await _unless_left(request, self._talk(request, asked, reply))

    async def responses(self, request: Request) -> ASGIApp:
        """POST /v1/responses."""
        sent = ResponsesRequest.parse(await self._body(request))
        asked = sent.conversation()
        requests.check(asked, self._model(asked.model))
        guided_calls.check(asked, self._model(asked.model))
        served = self._begin(request, asked.model, 1)
        reply = ResponsesReply(f"resp_{uuid.uuid4().hex}", sent, served.name)
        return await _unless_left(request, self._talk(request, asked, reply))

    async def _talk(self, request: Request, asked: ChatRequest, reply: Reply) -> ASGIApp:
        served: Served = request.state.served
        size = request.state.record.body
        prompt = await served.prompts.conversation(chat_rules.conversation(asked, served.model), size)
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        rules = chat_rules.text_rules(asked, served.model, opened=prompt.opened)
        guide = await guided_calls.guide(asked, served.model, served.guides, opened=prompt.opened)
        return await self._respond(request, asked, _Prompts([prompt.ids], limit, rules, guide), reply)

    async def completions(self, request: Request) -> ASGIApp:
        """POST /v1/completions."""
        asked = requests.parse(CompletionRequest, await self._body(request), self._model)
        prompts = _prompts(asked.prompt)
        if not prompts or len(prompts) * asked.n > self.settings.limits.choices:
            most = self.settings.limits.choices
            raise invalid(f"prompt and n ask for {len(prompts) * asked.n} answers; 1 to {most} are possible.", "prompt")
        self._begin(request, asked.model, len(prompts) * asked.n)
        return await _unless_left(request, self._complete(request, asked, prompts))

    async def _complete(
        self, request: Request, asked: CompletionRequest, prompts: Sequence[str | list[int]]
    ) -> ASGIApp:
        served: Served = request.state.served
        ids = [
            await served.prompts.text(one, "prompt") if isinstance(one, str) else served.prompts.ids(one, "prompt")
            for one in prompts
        ]
        text = served.model.vocabulary.tokenizer.decode
        echoes = [(one if isinstance(one, str) else text(one)) if asked.echo else "" for one in prompts]
        limit = requests.COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        rules = TextRules(asked.stops, tokens=chat_rules.kept_tokens(served.model))
        reply = _reply(CompletionReply, "cmpl-", asked, served)
        guide = await served.guides.of(asked.response_format)
        return await self._respond(request, asked, _Prompts(ids, limit, rules, guide, echoes), reply)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [_model_object(served) for served in self.served]})

    async def model_by_name(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return _json(_model_object(self.served.named(request.path_params["name"])))

    async def live(self, _: Request) -> Response:
        """GET /health/live: the process answers."""
        return _json({"status": "live"})

    async def ready(self, _: Request) -> Response:
        """GET /health/ready: the engine of each model generates tokens."""
        watched = Watched.read(self.settings.watchdog)
        if watched and watched.fault:
            raise ApiError(503, f"The model server is down: {watched.fault}", code="not_ready")
        # At once: a probe may take as long as the client that asks is willing to wait.
        models = list(self.served)
        found = await asyncio.gather(*[served.readiness.fault() for served in models])
        faults = [f"{served.name}: {fault}" for served, fault in zip(models, found, strict=True) if fault]
        if faults:
            raise ApiError(503, "The model does not answer.", code="not_ready", detail="; ".join(faults))
        return _json({"status": "ready"})

    async def _respond(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: _Prompts,
        reply: Reply,
    ) -> ASGIApp:
        served, record = request.state.served, request.state.record
        record.streamed = asked.stream
        sampling, end_ids = asked.sampling(served.model), asked.end_ids(served.model)
        if prompts.guide and served.model.guided:  # the grammar allows nothing after these
            end_ids = list(dict.fromkeys([*end_ids, *served.model.guided.stop_token_ids]))
        made = [
            TokenRequest(
                ids, requests.token_limit(prompts.limit, len(ids), served.model), sampling, end_ids,
                streaming=served.model.streams, log_probs=asked.log_probs, guide=prompts.guide,
            )
            for ids in prompts.ids
        ]  # fmt: skip
        job = Job(reply, made, asked.n, prompts.rules, prompts.echoes)
        if asked.stream:
            return EventStream(lambda outbox: served.jobs.stream(job, record, outbox), self.settings.limits)
        return _json(await served.jobs.whole(job, record))

    async def _body(self, request: Request) -> bytes:
        """The request's body. ApiError if it, or all bodies, are too large, or if it arrives too slowly; ClientGone."""
        limits, admission = self.settings.limits, self.served.admission
        record: Record = request.state.record
        record.releases.append(lambda: admission.forget(record.body))
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"The content type is {kind[:100]}; it must be application/json.")
        too_large = ApiError(413, f"The body has more than {limits.body} bytes.", code="body_too_large")
        if int(request.headers.get("content-length", "0")) > limits.body:
            raise too_large
        parts = []
        try:
            async with asyncio.timeout(limits.header_seconds):
                async for part in request.stream():
                    parts.append(part)
                    record.body += len(part)
                    admission.keep(len(part))
                    if record.body > limits.body:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {limits.header_seconds:.0f} s.") from None
        except ClientDisconnect:
            raise ClientGone from None
        return b"".join(parts)

    def _model(self, name: str) -> Model:
        return self.served.named(name).model

    def _begin(self, request: Request, name: str, answers: int) -> Served:
        """The model that this request keeps until it ends, and room for its answers. Before any work for the request.

        ApiError if there is no model with this name, or no room.
        """
        served = self.served.named(name)
        record: Record = request.state.record
        record.model = name
        self.served.admission.enter(answers)
        served.begin()
        request.state.served = served

        def release() -> None:
            self.served.admission.leave(answers)
            served.end()

        record.releases.append(release)
        return served


def _reply(kind: type[Choices], prefix: str, asked: ChatRequest | CompletionRequest, served: Served) -> Reply:
    return kind(
        prefix + uuid.uuid4().hex,
        int(time.time()),
        served.name,
        served.model.vocabulary,
        usage=asked.stream_options.include_usage,
        log_probs=asked.log_probs,
    )


def _model_object(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "trtllm-builder",
        "max_model_len": served.model.max_seq_len,
    }


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a request, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    return [ids] if ids else [one for one in prompt if not isinstance(one, int)]


async def _unless_left(request: Request, work: Coroutine[Any, Any, ASGIApp]) -> ASGIApp:
    """The result of the work, which is cancelled if the client leaves first (ClientGone), also while it waits."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (watcher, task):
            one.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await one


def _json(content: Any) -> Response:
    return Response(json.dumps(content, ensure_ascii=False).encode(), media_type="application/json")


def application(settings: Settings, first: Sequence[tuple[Place, Model]], traces: Traces | None = None) -> Front:
    """The ASGI application. `first`: the models that it serves at the start."""
    gateway = Gateway(settings, first)
    metrics = Metrics(gateway.in_progress)
    metrics.registry.register(WatchdogCollector(settings.watchdog))

    async def show_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    routes = [
        Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
        Route("/v1/completions", gateway.completions, methods=["POST"]),
        Route("/v1/responses", gateway.responses, methods=["POST"]),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name:path}", gateway.model_by_name),
        Route("/health/live", gateway.live),
        Route("/health/ready", gateway.ready),
        Route("/metrics", show_metrics),
    ]

    # A router instead of a Starlette application, whose error responses are not OpenAI's.
    return Front(Router(routes, redirect_slashes=False, lifespan=gateway.lifespan), settings.keys, metrics, traces)
