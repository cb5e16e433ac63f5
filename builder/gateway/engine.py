"""Talks to the engine model over gRPC: one stream for each answer, which ends as soon as nobody wants it.

An unwanted answer is ended by a second request with the same id and the input `stop`, and its stream is read to its
end. Cancelling the stream would be simpler, but is not safe with Triton 24.10 (no fix is known): while responses arrive
quickly it can crash the whole server (seen here with four streams of a stand-in that generates without a pause), and
just after the final response it leaks the request, so that the server takes its whole exit timeout to stop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from builder.gateway.channel import Channel
from builder.gateway.errors import ApiError
from builder.gateway.http2 import BrokenStreamError, Ended, Stream
from builder.gateway.settings import Model
from builder.gateway.tensors import Decoder, Step, TokenRequest, encode, encode_stop, is_final, read_adapter

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
# In Triton's errors for a request that exceeds max_queue_size, and for one that waited too long.
BUSY = ("maximum queue size", "Request timeout expired")
STOP_ATTEMPTS, STOP_PAUSE = 20, 0.1  # how often, and seconds apart, a full queue is asked to stop an answer
STOP_SECONDS = 30.0  # for the engine to end an answer that was stopped, before its stream is cancelled
LONGEST_WAIT = 3600.0
CLOSE_SECONDS = 5.0  # for answers that were stopped, when the gateway ends

# What TensorRT-LLM's cache of LoRA adapters says (batch_manager/peftCacheManager.cpp, addRequestPeft).
ADAPTER_MISSING, ADAPTERS_FULL = "not found in cache. Please send LoRA weights", "PEFT Cache is full"

OnStep = Callable[[Step], bool]  # gets a response; whether more are wanted


class AdapterMissingError(ApiError):
    """The engine has no weights of the request's LoRA adapter, or no longer."""


class Engine:
    """The connection to one server's model. Must be made in the event loop that uses it."""

    def __init__(self, address: str, model: Model, silent_seconds: float = math.inf) -> None:
        self._model, self._silent_seconds = model, silent_seconds
        self._channel = Channel(address, METHOD)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bringing, self._brought = asyncio.Lock(), 0  # who sends the adapter, and how often the engine got it
        self.last_response = -math.inf  # time.monotonic of the last response that was no error

    async def close(self) -> None:
        """Closes the connection, once the answers that were stopped have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        await self._channel.close(CLOSE_SECONDS)

    async def generate(self, request: TokenRequest, request_id: str, on_step: OnStep) -> None:
        """Passes each response to `on_step`, up to the final one or until it wants no more.

        ApiError if the server fails, rejects the request, or sends nothing for too long after its first response. If
        this task is cancelled, the engine is told to stop.
        An engine keeps LoRA adapters in a cache, from which they can vanish: if it lacks the request's, the request is
        sent again, with the adapter. Only one request at a time brings it, because it can have hundreds of MB; those
        that waited meanwhile find it in the cache.
        """
        while True:
            brought = self._brought
            try:
                answer = await self._send(encode(self._model, request, request_id), on_step)
                await self._finished(answer, request_id)
                return
            except AdapterMissingError:
                async with self._bringing:
                    if brought == self._brought:
                        answer = await self._bring(request, request_id, on_step)
                        break
        await self._finished(answer, request_id)

    async def _bring(self, request: TokenRequest, request_id: str, on_step: OnStep) -> _Answer:
        """Sends the request with its adapter, up to the engine's first response: then the engine has the adapter."""
        answer = await self._send_with_adapter(request, request_id, on_step)
        try:
            await answer.started.wait()
        except asyncio.CancelledError:
            self._abandon(answer, request_id)
            raise
        if not (answer.done.done() and answer.done.exception()):
            self._brought += 1
        return answer

    async def _send_with_adapter(self, request: TokenRequest, request_id: str, on_step: OnStep) -> _Answer:
        """A function of its own, so that nothing refers to the adapter while the answer is generated."""
        adapter = await asyncio.to_thread(read_adapter, self._model)
        message = await asyncio.to_thread(encode, self._model, request, request_id, adapter)
        return await self._send(message, on_step)

    async def _send(self, message: Any, on_step: OnStep) -> _Answer:
        answer = _Answer(self, on_step)
        await self._begin(answer.stream, message)
        return answer

    async def _finished(self, answer: _Answer, request_id: str) -> None:
        try:
            while not answer.done.done():
                silent = max(time.monotonic() - answer.last_response, 0)  # 0 before the first response
                if silent >= self._silent_seconds:
                    message = f"The model server sent nothing for {self._silent_seconds:g} s."
                    raise ApiError(504, message, code="timeout")
                await asyncio.wait({answer.done}, timeout=min(self._silent_seconds - silent, LONGEST_WAIT))
            answer.done.result()
        finally:
            self._abandon(answer, request_id)

    def _abandon(self, answer: _Answer, request_id: str) -> None:
        """Ends an answer, if it has not ended, because nobody wants more of it."""
        answer.done.cancel()
        if not answer.ended.is_set():
            self._start(self._end(answer, request_id))

    async def _begin(self, stream: Stream, message: Any) -> None:
        try:
            await self._channel.begin(stream, message.SerializeToString())
        except BrokenStreamError as error:
            raise _broken(str(error)) from None

    async def _end(self, answer: _Answer, request_id: str) -> None:
        """Ends an answer that nobody wants."""
        if self._model.streams:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):  # a hung server does not answer the request to stop either
                    await self._stop(answer, request_id)
                    await answer.ended.wait()
        # A model that does not stream can't end a request to stop without a response: Triton 24.10 crashed when one in
        # Python did. Its only response is still to come, so its stream can be cancelled.
        if not answer.ended.is_set():
            answer.stream.cancel()

    async def _stop(self, answer: _Answer, request_id: str) -> None:
        for _ in range(STOP_ATTEMPTS):
            if answer.ended.is_set():
                return
            stop = _Answer(self, lambda step: True)
            try:
                await self._begin(stop.stream, encode_stop(self._model, request_id))
                await stop.done
            except ApiError as error:
                if error.status != 429:
                    return  # the server is gone, and the answer with it
                await asyncio.sleep(STOP_PAUSE)
            else:
                return
            finally:
                if not stop.ended.is_set():
                    stop.stream.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Answer:
    """The responses to one request. They are read to their end, even if nobody waits for `done` any more.

    done: completed when the answer is, or no more of it is wanted. started: there was a response, or none will come.
    ended: no more responses follow.
    """

    def __init__(self, engine: Engine, on_step: OnStep) -> None:
        self._engine, self._on_step = engine, on_step
        self._decoder = Decoder()
        self.stream = Stream(self._message, self._stream_ended)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started, self.ended = asyncio.Event(), asyncio.Event()
        self.last_response = math.inf  # as the engine's; there is none yet

    def _message(self, message: bytes) -> None:
        if self.ended.is_set():
            return
        try:
            response = service_pb2.ModelStreamInferResponse.FromString(message)
        except DecodeError:
            self.stream.cancel()
            return
        if response.error_message:
            self._finish(_rejected(response.error_message))
            return
        self._engine.last_response = self.last_response = time.monotonic()
        final = is_final(response.infer_response)
        if not self.done.done():
            self._deliver(response.infer_response, final)
        self.started.set()
        if final:
            self._finish()

    def _deliver(self, response: Any, final: bool) -> None:
        """Passes a response on. Sets `done` if no more are wanted, also because whoever uses them failed."""
        try:
            if not self._on_step(self._decoder.step(response, final=final)):
                self.done.set_result(None)
        except Exception as error:
            self.done.set_exception(error)

    def _finish(self, error: ApiError | None = None) -> None:
        """After the last response. Only now no more messages follow: ending earlier could cancel the stream."""
        self._set_ended()
        self.stream.finish()
        self._complete(error)

    def _stream_ended(self, how: Ended) -> None:
        self._set_ended()
        self._complete(_broken(f"gRPC status {how.status}: {how.message}"))

    def _set_ended(self) -> None:
        self.started.set()
        self.ended.set()

    def _complete(self, error: ApiError | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def _broken(detail: str) -> ApiError:
    return ApiError(503, "The model server does not answer. Try again later.", code="server_unavailable", detail=detail)


def _rejected(message: str) -> ApiError:
    if ADAPTER_MISSING in message:
        text = "The model server has lost the adapter. Try again."
        return AdapterMissingError(503, text, code="adapter_missing", detail=message)
    if ADAPTERS_FULL in message:
        text = "All adapters that the model server has room for are in use. Try again later."
        return ApiError(429, text, code="adapters_full", detail=message)
    if any(busy in message for busy in BUSY):
        return ApiError(429, "The model server's queue is full. Try again later.", code="queue_full", detail=message)
    return ApiError(500, "The model server failed on this request.", code="engine_error", detail=message)
