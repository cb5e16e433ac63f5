"""HTTP/1.1 with limits that uvicorn lacks: on the headers' size, on how long a client sends them, pauses between two
requests, and leaves its answers unread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from builder.gateway.limits import Limits
from builder.gateway.record import Record, log
from builder.gateway.unread import Unread

RESPONSE = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    b'{"error": {"message": "%s", "type": "invalid_request_error", "param": null, "code": null}}'
)


class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # mypy does not follow uvicorn
    """One connection. `limited` sets the limits, and what counts clients that do not read."""

    limits: Limits
    count_stalled: Callable[[], None]

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the clock for the first request's headers."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing as soon as the kernel takes no more
        self._unread = Unread(transport, self.limits.stalled_seconds, self._stalled)
        self._answering: RequestResponseCycle | None = None
        self._head_bytes, self._in_head = 0, True
        self._late: asyncio.TimerHandle | None = None
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks, and tells the request in progress, which with pipelining is not the one uvicorn tells."""
        self._stop_clock()
        self._unread.stop()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called by the transport when the kernel takes no more."""
        super().pause_writing()
        self._unread.start()

    def resume_writing(self) -> None:
        """Called by the transport when the kernel has taken all."""
        super().resume_writing()
        self._unread.stop()

    def data_received(self, data: bytes) -> None:
        """Parses data. A head that is too large ends the connection, even if the parser has not seen its end."""
        self._completed = False
        super().data_received(data)
        if self._in_head and not self._completed:  # so all of the piece belongs to the head
            self._head_bytes += len(data)
            if self._head_bytes > 2 * self.limits.header and not self.transport.is_closing():
                self._end(b"431 Request Header Fields Too Large", b"The request's headers are too large.")

    def on_message_complete(self) -> None:
        """Called by the parser at the end of a request."""
        super().on_message_complete()
        self._completed = True

    def on_message_begin(self) -> None:
        """Called by the parser at the start of a request."""
        super().on_message_begin()
        self._in_head = True
        self._start_clock()

    def on_headers_complete(self) -> None:
        """Called by the parser after the headers."""
        self._stop_clock()
        self._in_head, self._head_bytes = False, 0
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.header:
            self._end(b"431 Request Header Fields Too Large", b"The request's headers are too large.")
            raise ValueError("headers too large")  # ends parsing
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_response_complete(self) -> None:
        """Called by uvicorn at the end of an answer. A request of which the rest is still to come ends the connection;
        otherwise the next one must begin in time, whatever else the client sends."""
        following = self.pipeline[-1][0] if self.pipeline else None
        incomplete = following is None and self.cycle.more_body
        super().on_response_complete()
        if following is not None:
            self._answering = following
        elif incomplete:
            self.transport.close()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.limits.idle_seconds, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Called for what is no HTTP, and for headers that were too large, which have been answered."""
        if not self.transport.is_closing():
            self._end(b"400 Bad Request", b"The request is not valid HTTP.")

    def _start_clock(self) -> None:
        self._stop_clock()
        self._late = self.loop.call_later(self.limits.header_seconds, self._too_late)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._end(b"408 Request Timeout", b"The request's headers did not arrive in time.")

    def _stalled(self, unread: int) -> None:
        """Notes a client that read nothing, whose connection ends now."""
        record: Record | None = self._answering.scope["state"].get("record") if self._answering else None
        if record is not None:
            record.stalled = True
        log(
            "warning", "client stalled", request_id=record.id if record else None, unread_bytes=unread,
            detail=f"The client read nothing for {self.limits.stalled_seconds:g} s; its connection was closed.",
        )  # fmt: skip
        self.count_stalled()

    def _end(self, status: bytes, message: bytes) -> None:
        self._stop_clock()
        body: Any = RESPONSE % (status, len(RESPONSE.partition(b"\r\n\r\n")[2] % message), message)
        self.transport.write(body)
        self.transport.close()


def limited(limits: Limits, count_stalled: Callable[[], None]) -> type[LimitedProtocol]:
    """The protocol class with these limits, for uvicorn, which makes the connections itself."""
    return type("Limited", (LimitedProtocol,), {"limits": limits, "count_stalled": staticmethod(count_stalled)})
