"""The stream of one answer from the engine model: its responses, its end, and Triton's errors as those of the API."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from builder.gateway.errors import ApiError
from builder.gateway.http2 import Ended, Stream
from builder.gateway.tensors import Decoder, Step, is_final

# In Triton's errors for a request that exceeds max_queue_size, and for one that waited too long.
BUSY = ("maximum queue size", "Request timeout expired")

# What TensorRT-LLM's cache of LoRA adapters says (batch_manager/peftCacheManager.cpp, addRequestPeft).
ADAPTER_MISSING, ADAPTERS_FULL = "not found in cache. Please send LoRA weights", "PEFT Cache is full"

OnStep = Callable[[Step], bool]  # gets a response; whether more are wanted


class AdapterMissingError(ApiError):
    """The engine has no weights of the request's LoRA adapter, or no longer."""


class AnswerStream:
    """The responses to one request. They are read to their end, even if nobody waits for `done` any more.

    done: completed when the answer is, or no more of it is wanted. started: there was a response, or none will come.
    ended: no more responses follow. on_response: gets the time of each that is no error (time.monotonic).
    """

    def __init__(self, on_step: OnStep, on_response: Callable[[float], None]) -> None:
        self._on_step, self._on_response = on_step, on_response
        self._decoder = Decoder()
        self.stream = Stream(self._message, self._stream_ended)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started, self.ended = asyncio.Event(), asyncio.Event()
        self.last_response = math.inf  # there is none yet

    def _message(self, message: bytes) -> None:
        if self.ended.is_set():
            return
        try:
            response = service_pb2.ModelStreamInferResponse.FromString(message)
        except DecodeError:
            self.stream.cancel()
            return
        if response.error_message:
            self._finish(rejected(response.error_message))
            return
        self.last_response = time.monotonic()
        self._on_response(self.last_response)
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
        self._complete(broken(f"gRPC status {how.status}: {how.message}"))

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


def broken(detail: str) -> ApiError:
    return ApiError(503, "The model server does not answer. Try again later.", code="server_unavailable", detail=detail)


def rejected(message: str) -> ApiError:
    if ADAPTER_MISSING in message:
        text = "The model server has lost the adapter. Try again."
        return AdapterMissingError(503, text, code="adapter_missing", detail=message)
    if ADAPTERS_FULL in message:
        text = "All adapters that the model server has room for are in use. Try again later."
        return ApiError(429, text, code="adapters_full", detail=message)
    if any(busy in message for busy in BUSY):
        return ApiError(429, "The model server's queue is full. Try again later.", code="queue_full", detail=message)
    return ApiError(500, "The model server failed on this request.", code="engine_error", detail=message)
