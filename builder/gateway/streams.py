"""A stream of server-sent events to a client that may be slow, stop reading, or leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.types import Receive, Scope, Send

from builder.gateway.errors import ApiError
from builder.gateway.limits import Limits

# Tokens that come faster than this share a write: at 128 tokens of 1 ms each, writing each alone takes a third of the
# gateway's CPU time. Real engines take longer for a token, and then nothing waits.
PACE = 0.005  # seconds
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect the events
]


class ClientGone(Exception):
    """The client has closed its connection, or does not read what it asked for."""


class Outbox:
    """Events that wait to be sent. Those that come while the client is busy reading are sent in one piece."""

    def __init__(self, limit: int) -> None:
        self._parts: list[bytes] = []
        self._size, self._limit = 0, limit
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: bytes) -> None:
        """Adds an event. ClientGone if more wait than a client may leave unread."""
        if not event:
            return
        self._parts.append(event)
        self._size += len(event)
        if self._size > self._limit:
            raise ClientGone
        self._changed.set()

    def close(self) -> None:
        """No more events follow."""
        self._closed = True
        self._changed.set()

    async def take(self, pause: float = 0.0) -> bytes:
        """All events that wait, at least one; b"" after the last. First waits `pause` seconds for more."""
        if pause > 0 and not self._closed:
            await asyncio.sleep(pause)
        while not self._parts and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        taken = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return taken


class EventStream:
    """The response of a streamed request, as an ASGI application.

    `produce` fills the outbox. Its task is cancelled when the client leaves. If it fails before the first event, the
    error becomes the response's status; later, an event.
    """

    def __init__(self, produce: Callable[[Outbox], Awaitable[None]], limits: Limits) -> None:
        self._produce, self._limits = produce, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events. ApiError if there are none; ClientGone if the client left."""
        outbox = Outbox(self._limits.stalled_bytes)
        producer = asyncio.ensure_future(self._produce(outbox))
        producer.add_done_callback(lambda _: outbox.close())
        watcher = asyncio.ensure_future(left(receive))
        watcher.add_done_callback(lambda _: producer.cancel())
        try:
            events = await outbox.take()
            if not events:  # nothing was sent yet, so an error can still be a status
                await _result(producer)
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            while events:
                await _send(send, events, more=True)
                events = await outbox.take(PACE)
            try:
                await _result(producer)
            except ApiError as error:
                await _send(send, f"data: {json.dumps(error.body)}\n\n".encode(), more=True)
                await _send(send, b"", more=False)
                raise
            await _send(send, b"", more=False)
        finally:
            for task in (watcher, producer):
                task.cancel()
                with suppress(asyncio.CancelledError, ApiError, ClientGone):
                    await task


async def _send(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _result(producer: asyncio.Future[None]) -> None:
    """Raises what the producer raised; ClientGone if it was cancelled because the client left."""
    try:
        await producer
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        raise ClientGone from None


async def left(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
