"""Talks to the engine model over gRPC: one stream for each answer, which ends as soon as nobody wants it.

An unwanted answer is ended by a second request with the same id and the input `stop`, and its stream is read to its
end. Cancelling the stream would be simpler, but is not safe with Triton 24.10: while responses arrive quickly it can
crash the whole server (seen here with four streams of a stand-in that generates without a pause), and just after the
final response it leaks the request, so that the server takes its whole exit timeout to stop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from builder.gateway.errors import ApiError
from builder.gateway.settings import Model
from builder.gateway.tensors import Decoder, Step, TokenRequest, encode, encode_stop, is_final

BUSY = "maximum queue size"  # in Triton's error for a request that exceeds max_queue_size
STOP_ATTEMPTS, STOP_PAUSE = 20, 0.1  # how often, and seconds apart, a full queue is asked to stop an answer
STOP_SECONDS = 30.0  # for the engine to end an answer that was stopped, before its stream is cancelled
OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # the server is ours; HTTP_PROXY and friends are for other hosts
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

OnStep = Callable[[Step], bool]  # gets a response; whether more are wanted


class Engine:
    """The connection to one server's model. Must be made in the event loop that uses it."""

    def __init__(self, address: str, model: Model) -> None:
        self._model = model
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._tasks: set[asyncio.Task[None]] = set()
        self.last_response = -math.inf  # time.monotonic of the last response that was no error

    async def close(self) -> None:
        """Closes the connection, once the answers that were stopped have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        await self._channel.close()

    async def generate(self, request: TokenRequest, request_id: str, on_step: OnStep) -> None:
        """Passes each response to `on_step`, up to the final one or until it wants no more.

        ApiError if the server fails or rejects the request. If this task is cancelled, the engine is told to stop.
        """
        call = self._stub.ModelStreamInfer()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = asyncio.Event()
        reading = self._start(self._read(call, encode(self._model, request, request_id), on_step, done, ended))
        try:
            await done
        finally:
            if not ended.is_set():
                self._start(self._end(call, reading, request_id))

    async def _read(
        self, call: Any, message: Any, on_step: OnStep, done: asyncio.Future[None], ended: asyncio.Event
    ) -> None:
        """Reads a stream to its end, even if nobody waits for `done` any more. `ended`: no more responses follow."""
        try:
            await call.write(message)
            await self._responses(call, on_step, done)
        except Exception as error:
            if not done.done():
                done.set_exception(_broken(error) if isinstance(error, grpc.aio.AioRpcError) else error)
        ended.set()
        with suppress(grpc.aio.AioRpcError):
            await _finish(call)

    async def _responses(self, call: Any, on_step: OnStep, done: asyncio.Future[None]) -> None:
        """Reads responses up to the final one or an error."""
        decoder, final = Decoder(), False
        while not final:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise _broken(await call.details())
            if response.error_message:
                raise _rejected(response.error_message)
            self.last_response = time.monotonic()
            final = is_final(response.infer_response)
            if not done.done():
                _deliver(decoder, response.infer_response, on_step, done)

    async def _end(self, call: Any, reading: asyncio.Task[None], request_id: str) -> None:
        """Ends an answer that nobody wants."""
        if self._model.streams:
            await self._stop(reading, request_id)
            await asyncio.wait({reading}, timeout=STOP_SECONDS)
        # A model that does not stream takes no other request meanwhile; its only response is still to come.
        if not reading.done():
            call.cancel()

    async def _stop(self, reading: asyncio.Task[None], request_id: str) -> None:
        for _ in range(STOP_ATTEMPTS):
            if reading.done():
                return
            call = self._stub.ModelStreamInfer()
            try:
                await call.write(encode_stop(self._model, request_id))
                response = await call.read()
                await _finish(call)
            except grpc.aio.AioRpcError:
                return  # the server is gone, and the answer with it
            if response is grpc.aio.EOF or BUSY not in response.error_message:
                return
            await asyncio.sleep(STOP_PAUSE)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _finish(call: Any) -> None:
    """Ends a stream whose responses have been read. Closing the connection earlier would cancel it (see above)."""
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass


def _deliver(decoder: Decoder, response: Any, on_step: OnStep, done: asyncio.Future[None]) -> None:
    """Passes a response on. Sets `done` after the final one, or if no more are wanted, also because this failed."""
    try:
        step = decoder.step(response)
        if not on_step(step) or step.final:
            done.set_result(None)
    except Exception as error:
        done.set_exception(error)


def _broken(error: object) -> ApiError:
    detail = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return ApiError(503, "The model server does not answer. Try again later.", code="server_unavailable", detail=detail)


def _rejected(message: str) -> ApiError:
    if BUSY in message:
        return ApiError(429, "The model server's queue is full. Try again later.", code="queue_full", detail=message)
    return ApiError(500, "The model server failed on this request.", code="engine_error", detail=message)
