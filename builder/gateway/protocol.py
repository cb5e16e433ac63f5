"""HTTP/1.1 with limits on the size of a request's headers and on the time that they take, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from builder.gateway.limits import Limits

RESPONSE = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    b'{"error": {"message": "%s", "type": "invalid_request_error", "param": null, "code": null}}'
)


class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # mypy does not follow uvicorn
    """One connection. `limited` sets the limits."""

    limits: Limits

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the clock for the first request's headers."""
        super().connection_made(transport)
        self._head_bytes, self._in_head = 0, True
        self._late: asyncio.TimerHandle | None = None
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop_clock()
        super().connection_lost(exc)

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

    def _end(self, status: bytes, message: bytes) -> None:
        self._stop_clock()
        body: Any = RESPONSE % (status, len(RESPONSE.partition(b"\r\n\r\n")[2] % message), message)
        self.transport.write(body)
        self.transport.close()


def limited(limits: Limits) -> type[LimitedProtocol]:
    """The protocol class with these limits, for uvicorn, which makes the connections itself."""
    return type("Limited", (LimitedProtocol,), {"limits": limits})
