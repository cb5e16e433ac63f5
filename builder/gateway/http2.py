"""gRPC streams over one HTTP/2 connection (RFC 9113), for many small messages.

grpc.aio wakes its event loop for each message, which costs more than everything that the gateway does with a token.
Here one read of the socket brings the messages of all streams, and each is passed on by a function call. Only what
gRPC's servers send is understood: no push, no priorities, no compression.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from builder.gateway.frames import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_FRAME,
    LARGEST_WINDOW,
    LAST_STREAM,
    MESSAGE,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTING,
    SETTINGS,
    WINDOW_UPDATE,
    WORD,
    unpadded,
)
from builder.gateway.header_block import named_fields, request_block

TOP_UP = 1 << 24  # bytes received until the server is told that it may send more


class BrokenStreamError(Exception):
    """A stream has ended without the server's consent, or could not begin; why."""


class Ended(NamedTuple):
    """How a stream ended: gRPC's status (0 is success), and the server's message."""

    status: int
    message: str


class Stream:
    """A call. `on_message` gets each message of the server; `on_end` is called once. Neither may raise."""

    def __init__(self, on_message: Callable[[bytes], None], on_end: Callable[[Ended], None]) -> None:
        self.on_message, self.on_end = on_message, on_end
        self.id = 0
        self.connection: Connection | None = None  # None before the call begins and after it has ended
        self.partial = b""  # the beginning of a message
        self.unsent = b""
        self.send_window, self.received = DEFAULT_WINDOW, 0
        self.finishing = False

    def finish(self) -> None:
        """Tells the server that no more messages follow."""
        self.finishing = True
        if self.connection and not self.unsent:
            self.connection.send(DATA, END_STREAM, self.id)

    def cancel(self) -> None:
        """Ends the stream at once."""
        if self.connection:
            self.connection.send(RST_STREAM, 0, self.id, WORD.pack(CANCEL))
            self.connection.end(self, Ended(1, "cancelled"))


class Connection(asyncio.Protocol):
    """One connection. `usable`: new streams can begin."""

    def __init__(self, authority: str, path: str) -> None:
        self._head = request_block(authority, path)
        self._streams: dict[int, Stream] = {}
        self._next_id, self._last_id = 1, LAST_STREAM
        self._rest = b""  # the beginning of a frame
        self._block: tuple[int, int, bytes] | None = None  # the beginning of a header block: stream, flags, bytes
        self._send_window, self._stream_window, self._received = DEFAULT_WINDOW, DEFAULT_WINDOW, 0
        self.usable = True
        self.idle = asyncio.Event()  # set while there are no streams
        self.idle.set()

    def connection_made(self, transport: Any) -> None:
        """Sends the preface and the settings: no push, no dynamic table, and windows that leave nothing unsent."""
        self._transport = transport
        settings = ((HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, LARGEST_WINDOW))
        transport.write(PREFACE)
        self.send(SETTINGS, 0, 0, b"".join(SETTING.pack(*setting) for setting in settings))
        self.send(WINDOW_UPDATE, 0, 0, WORD.pack(LARGEST_WINDOW - DEFAULT_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all streams."""
        self.usable = False
        self._end_all(f"the connection was lost{f': {exc}' if exc else ''}")

    def close(self) -> None:
        """Closes the connection. Streams that are open end."""
        self.usable = False
        self._transport.close()

    def begin(self, stream: Stream, message: bytes) -> None:
        """Begins a stream with the client's message. BrokenStreamError if the connection is not usable any more."""
        if not self.usable:
            raise BrokenStreamError("the connection was closed")
        stream.id, stream.connection, stream.send_window = self._next_id, self, self._stream_window
        self._streams[stream.id] = stream
        self.idle.clear()
        self._next_id += 2
        self.usable = self._next_id < LAST_STREAM
        self.send(HEADERS, END_HEADERS, stream.id, self._head)
        stream.unsent = MESSAGE.pack(0, len(message)) + message
        self._send_unsent(stream)

    def end(self, stream: Stream, how: Ended) -> None:
        """Forgets a stream, and tells it how it ended."""
        self._streams.pop(stream.id, None)
        stream.connection = None
        if not self._streams:
            self.idle.set()
            if not self.usable:
                self._transport.close()
        stream.on_end(how)

    def send(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        """Sends a frame."""
        length = len(payload)
        self._transport.write(FRAME.pack(length >> 8, length & 255, kind, flags, stream) + payload)

    def _send_unsent(self, stream: Stream) -> None:
        """Sends what the windows allow."""
        while stream.unsent and (size := min(LARGEST_FRAME, stream.send_window, self._send_window)) > 0:
            piece, stream.unsent = stream.unsent[:size], stream.unsent[size:]
            stream.send_window -= len(piece)
            self._send_window -= len(piece)
            last = stream.finishing and not stream.unsent
            self.send(DATA, END_STREAM if last else 0, stream.id, piece)

    def data_received(self, data: bytes) -> None:
        """Reads frames."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= FRAME.size:
            high, low, kind, flags, id = FRAME.unpack_from(data, at)
            start = at + FRAME.size
            stop = start + (high << 8) + low
            if stop - start > LARGEST_FRAME:
                self._fail("this is not a gRPC port")
                return
            if stop > end:
                break
            at = stop
            if kind == DATA and not flags:
                self._count(stop - start)
                stream = self._streams.get(id)
                if stream is not None:
                    self._receive(stream, data, start, stop)
            else:
                self._frame(kind, flags, id & LAST_STREAM, data[start:stop])
        self._rest = data[at:]

    def _count(self, size: int) -> None:
        self._received += size
        if self._received > TOP_UP:
            self.send(WINDOW_UPDATE, 0, 0, WORD.pack(self._received))
            self._received = 0

    def _receive(self, stream: Stream, data: bytes, start: int, stop: int) -> None:
        """Passes on the messages in data[start:stop]."""
        stream.received += stop - start
        if stream.received > TOP_UP:
            self.send(WINDOW_UPDATE, 0, stream.id, WORD.pack(stream.received))
            stream.received = 0
        if stream.partial:
            data = stream.partial + data[start:stop]
            start, stop = 0, len(data)
        while stop - start >= MESSAGE.size:
            compressed, length = MESSAGE.unpack_from(data, start)
            following = start + MESSAGE.size + length
            if following > stop:
                break
            if compressed:
                self._fail("the server compresses its messages")
                return
            stream.on_message(data[start + MESSAGE.size : following])
            start = following
        stream.partial = data[start:stop]

    def _frame(self, kind: int, flags: int, id: int, payload: bytes) -> None:
        """Any frame but plain DATA. Unknown kinds are ignored, as the protocol demands."""
        try:
            if kind == DATA:
                self._last_data(flags, id, payload)
            elif kind == HEADERS:
                self._block = (id, flags, unpadded(flags, payload)[5 if flags & PRIORITY else 0 :])
                self._headers(flags)
            elif kind == CONTINUATION and self._block and self._block[0] == id:
                self._block = (id, self._block[1], self._block[2] + payload)
                self._headers(flags)
            elif kind == RST_STREAM:
                self._end_one(id, Ended(14, f"the server ended the stream (code {WORD.unpack(payload)[0]})"))
            elif kind == SETTINGS and not flags & ACK:
                self._settings(payload)
            elif kind == PING and not flags & ACK:
                self.send(PING, ACK, 0, payload)
            elif kind == GOAWAY:
                self._go_away(*struct.unpack_from(">II", payload))
            elif kind == WINDOW_UPDATE:
                self._window(id, WORD.unpack(payload)[0] & LARGEST_WINDOW)
        except (ValueError, IndexError, struct.error) as error:
            self._fail(f"the server sent a damaged frame of kind {kind}: {error}")

    def _last_data(self, flags: int, id: int, payload: bytes) -> None:
        self._count(len(payload))
        stream = self._streams.get(id)
        if stream is not None:
            content = unpadded(flags, payload)
            self._receive(stream, content, 0, len(content))
        if flags & END_STREAM:
            self._end_one(id, Ended(2, "the server ended the stream without a status"))

    def _headers(self, flags: int) -> None:
        if flags & END_HEADERS and self._block:
            id, first_flags, block = self._block
            self._block = None
            if first_flags & END_STREAM:
                fields = named_fields(block)
                message = unquote_to_bytes(fields.get(b"grpc-message", b"")).decode("utf-8", "replace")
                self._end_one(id, Ended(int(fields.get(b"grpc-status", b"2")), message))

    def _settings(self, payload: bytes) -> None:
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                change, self._stream_window = value - self._stream_window, value
                for stream in self._streams.values():
                    stream.send_window += change
        self.send(SETTINGS, ACK, 0)
        self._send_all()

    def _window(self, id: int, size: int) -> None:
        if not id:
            self._send_window += size
            self._send_all()
        elif stream := self._streams.get(id):
            stream.send_window += size
            self._send_unsent(stream)

    def _send_all(self) -> None:
        for stream in self._streams.values():
            if stream.unsent:
                self._send_unsent(stream)

    def _go_away(self, last: int, code: int) -> None:
        """The server takes no more streams, and has not seen those after `last`."""
        self.usable = False
        self._last_id = last & LAST_STREAM
        for stream in [stream for id, stream in self._streams.items() if id > self._last_id]:
            self.end(stream, Ended(14, f"the server takes no more requests (code {code})"))
        if not self._streams:
            self._transport.close()

    def _end_one(self, id: int, how: Ended) -> None:
        if stream := self._streams.get(id):
            self.end(stream, how)

    def _end_all(self, why: str) -> None:
        for stream in list(self._streams.values()):
            self.end(stream, Ended(14, why))

    def _fail(self, why: str) -> None:
        self._rest = b""
        self.usable = False
        self._end_all(why)
        self._transport.abort()
