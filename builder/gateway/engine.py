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
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from builder.gateway.answer_stream import AdapterMissingError, AnswerStream, OnStep, broken
from builder.gateway.channel import Channel
from builder.gateway.errors import ApiError
from builder.gateway.http2 import BrokenStreamError, Stream
from builder.gateway.settings import Model
from builder.gateway.tensors import TokenRequest, encode, encode_stop, read_adapter

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
STOP_ATTEMPTS, STOP_PAUSE = 20, 0.1  # how often, and seconds apart, a full queue is asked to stop an answer
WAKE_SECONDS, WAKES = 0.1, 3  # after which, and how often, another request follows one to stop that is not answered
STOP_SECONDS = 30.0  # for the engine to end an answer that was stopped, before its stream is cancelled
LONGEST_WAIT = 3600.0
CLOSE_SECONDS = 5.0  # for answers that were stopped, when the gateway ends


class Engine:
    """The connection to one server's model. Must be made in the event loop that uses it."""

    def __init__(self, address: str, model: Model, silent_seconds: float = math.inf) -> None:
        self._model, self._silent_seconds = model, silent_seconds
        self._channel = Channel(address, METHOD)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bringing, self._brought = asyncio.Lock(), 0  # who sends the adapter, and how often the engine got it
        self.last_response = -math.inf  # time.monotonic of the last response that was no error
        self._woken = -math.inf  # when a request was sent to wake Triton's batcher

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

    async def _bring(self, request: TokenRequest, request_id: str, on_step: OnStep) -> AnswerStream:
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

    async def _send_with_adapter(self, request: TokenRequest, request_id: str, on_step: OnStep) -> AnswerStream:
        """A function of its own, so that nothing refers to the adapter while the answer is generated."""
        adapter = await asyncio.to_thread(read_adapter, self._model)
        message = await asyncio.to_thread(encode, self._model, request, request_id, adapter)
        return await self._send(message, on_step)

    async def _send(self, message: Any, on_step: OnStep) -> AnswerStream:
        answer = AnswerStream(on_step, self._responded)
        await self._begin(answer.stream, message)
        return answer

    async def _finished(self, answer: AnswerStream, request_id: str) -> None:
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

    def _abandon(self, answer: AnswerStream, request_id: str) -> None:
        """Ends an answer, if it has not ended, because nobody wants more of it."""
        answer.done.cancel()
        if not answer.ended.is_set():
            self._start(self._end(answer, request_id))

    async def _begin(self, stream: Stream, message: Any) -> None:
        try:
            await self._channel.begin(stream, message.SerializeToString())
        except BrokenStreamError as error:
            raise broken(str(error)) from None

    async def _end(self, answer: AnswerStream, request_id: str) -> None:
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

    async def _stop(self, answer: AnswerStream, request_id: str) -> None:
        for _ in range(STOP_ATTEMPTS):
            if answer.ended.is_set():
                return
            try:
                await self._ask_to_stop(request_id, WAKES)
            except ApiError as error:
                if error.status != 429:
                    return  # the server is gone, and the answer with it
                await asyncio.sleep(STOP_PAUSE)
            else:
                return

    async def _ask_to_stop(self, request_id: str, wakes: int) -> None:
        """Ends the request with this id. If Triton seems to have forgotten it, up to so many others follow.

        Triton 24.10 can lose the signal that wakes its dynamic batcher, which then sleeps for half a second or until
        another request comes: in one of 16 times that 200 clients left at once (core, dynamic_batch_scheduler.cc,
        default_wait_microseconds).
        """
        stop = AnswerStream(lambda step: True, self._responded)
        try:
            await self._begin(stop.stream, encode_stop(self._model, request_id))
            for _ in range(wakes):
                await asyncio.wait({stop.done}, timeout=WAKE_SECONDS)
                if stop.done.done():
                    break
                self._wake(request_id)
            await stop.done
        finally:
            if not stop.ended.is_set():
                stop.stream.cancel()

    def _wake(self, request_id: str) -> None:
        """Sends a request that changes nothing, one for all that wait."""
        if time.monotonic() - self._woken >= WAKE_SECONDS:
            self._woken = time.monotonic()
            self._start(self._ask_again(request_id))

    async def _ask_again(self, request_id: str) -> None:
        with suppress(ApiError, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._ask_to_stop(request_id, 0)

    def _responded(self, at: float) -> None:
        self.last_response = at

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
