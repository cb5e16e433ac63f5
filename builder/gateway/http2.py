"""gRPC streams over one HTTP/2 connection, for many small messages. The library h2 does all of HTTP/2.

grpc.aio wakes its event loop for each message, which costs more than everything that the gateway does with a token.
Here one read of the socket brings the messages of all streams, and each is passed on by a function call. Messages that
are compressed are refused. For the 128 messages of an answer h2 takes 1.2 CPU milliseconds by itself, the gateway 4.3
to 5.3.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, cast
from urllib.parse import unquote_to_bytes

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

MESSAGE = struct.Struct(">BI")  # what precedes a gRPC message: whether it is compressed, and its length
LARGEST_MESSAGE = 1 << 26
WINDOW, DEFAULT_WINDOW = 1 << 24, 65535  # bytes that the server may send before they are acknowledged


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
        self.partial, self.needed = bytearray(), 0  # the beginning of a message, and how many bytes make progress
        self.unsent = memoryview(b"")  # of a message, whose rest must not be copied with each frame
        self.finishing = False
        self.status = Ended(2, "the server ended the stream without a status")

    def finish(self) -> None:
        """Tells the server that no more messages follow."""
        self.finishing = True
        if self.connection and not self.unsent:
            self.connection.finish(self)

    def cancel(self) -> None:
        """Ends the stream at once."""
        if self.connection:
            self.connection.cancel(self)


class Connection(asyncio.Protocol):
    """One connection. `usable`: new streams can begin."""

    def __init__(self, authority: str, path: str) -> None:
        self._head = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", authority),
            (":path", path),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._streams: dict[int, Stream] = {}
        self._held_up: dict[int, Stream] = {}  # those that have something unsent, for which a window was too small
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._h2.state_machine = _Draining()
        self.usable = True
        self.idle = asyncio.Event()  # set while there are no streams
        self.idle.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the settings: no push, and windows that hold no server up."""
        self._transport = cast(asyncio.Transport, transport)
        values = {
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
            SettingCodes.MAX_HEADER_LIST_SIZE: H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
        }
        self._h2.local_settings = Settings(client=True, initial_values=dict(values))
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOW - DEFAULT_WINDOW)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all streams."""
        self.usable = False
        self._end_all(f"the connection was lost{f': {exc}' if exc else ''}")

    def close(self) -> None:
        """Closes the connection. Streams that are open end."""
        self.usable = False
        self._transport.close()

    def begin(self, stream: Stream, message: bytes) -> None:
        """Begins a stream with the client's message. BrokenStreamError if the connection takes no more."""
        if not self.usable:
            raise BrokenStreamError("the connection was closed")
        try:
            stream.id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream.id, self._head)
        except ProtocolError as error:
            raise BrokenStreamError(str(error)) from None
        stream.connection = self
        self._streams[stream.id] = stream
        self.idle.clear()
        self.usable = stream.id + 2 < H2Connection.HIGHEST_ALLOWED_STREAM_ID
        stream.unsent = memoryview(MESSAGE.pack(0, len(message)) + message)
        self._send_unsent(stream)
        self._flush()

    def finish(self, stream: Stream) -> None:
        """Ends the client's side of a stream."""
        with suppress(ProtocolError):  # the server has ended it; this event is still to be passed on
            self._h2.end_stream(stream.id)
        self._flush()

    def cancel(self, stream: Stream) -> None:
        """Ends a stream at once."""
        with suppress(ProtocolError):  # as above
            self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
        self._flush()
        self._end(stream, Ended(1, "cancelled"))

    def data_received(self, data: bytes) -> None:
        """Passes on what the server sends."""
        try:
            for event in self._h2.receive_data(data):
                if isinstance(event, DataReceived):
                    self._data(event)
                else:
                    self._event(event)
        except (ProtocolError, ValueError) as error:
            self._fail(f"the server did not keep to the protocol: {error}")
        self._flush()

    def _data(self, event: DataReceived) -> None:
        self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        data = event.data or b""
        if stream.partial:
            stream.partial += data
            if len(stream.partial) < stream.needed:
                return
            data = bytes(stream.partial)
        start, stop, stream.needed = 0, len(data), MESSAGE.size
        while stop - start >= MESSAGE.size and stream.connection:
            compressed, length = MESSAGE.unpack_from(data, start)
            if compressed or length > LARGEST_MESSAGE:
                raise ValueError("a message is compressed" if compressed else f"a message of {length} bytes")
            following = start + MESSAGE.size + length
            if following > stop:
                stream.needed = following - start
                break
            stream.on_message(data[start + MESSAGE.size : following])
            start = following
        stream.partial = bytearray(data[start:])

    def _event(self, event: Event) -> None:
        """All but data. Nothing needs to be done about other kinds: h2 answers what must be answered."""
        if isinstance(event, ResponseReceived | TrailersReceived):
            self._headers(event)
        elif isinstance(event, StreamEnded):
            self._ended(event.stream_id)
        elif isinstance(event, StreamReset):
            if stream := self._streams.get(event.stream_id):
                self._end(stream, Ended(14, f"the server ended the stream (code {int(event.error_code or 0)})"))
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            for stream in list(self._held_up.values()):
                self._send_unsent(stream)
        elif isinstance(event, ConnectionTerminated):
            self._go_away(event.last_stream_id or 0, int(event.error_code or 0))

    def _headers(self, event: ResponseReceived | TrailersReceived) -> None:
        fields = {bytes(name): bytes(value) for name, value in event.headers or ()}
        if b"grpc-status" in fields and (stream := self._streams.get(event.stream_id or 0)):
            message = unquote_to_bytes(fields.get(b"grpc-message", b"")).decode("utf-8", "replace")
            stream.status = Ended(int(fields[b"grpc-status"]), message)

    def _ended(self, id: int) -> None:
        """The server has ended a stream. If the client has not, nobody wants to have the rest."""
        if stream := self._streams.get(id):
            if stream.unsent or not stream.finishing:
                with suppress(ProtocolError):  # the server has also reset it
                    self._h2.reset_stream(id, ErrorCodes.CANCEL)
            self._end(stream, stream.status)

    def _go_away(self, last: int, code: int) -> None:
        """The server takes no more streams, and has not seen those after `last`."""
        self.usable = False
        for stream in [stream for id, stream in self._streams.items() if id > last]:
            self._end(stream, Ended(14, f"the server takes no more requests (code {code})"))
        if not self._streams:
            self._transport.close()

    def _send_unsent(self, stream: Stream) -> None:
        """Sends what the windows allow."""
        with suppress(ProtocolError):  # the server has ended the stream; this event is still to be passed on
            while stream.unsent:
                size = min(self._h2.max_outbound_frame_size, self._h2.local_flow_control_window(stream.id))
                if size <= 0:
                    break
                piece, stream.unsent = stream.unsent[:size], stream.unsent[size:]
                self._h2.send_data(stream.id, bytes(piece), end_stream=stream.finishing and not stream.unsent)
        if stream.unsent:
            self._held_up[stream.id] = stream
        else:
            stream.unsent = memoryview(b"")  # lets go of the message
            self._held_up.pop(stream.id, None)

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _end(self, stream: Stream, how: Ended) -> None:
        """Forgets a stream, and tells it how it ended."""
        self._streams.pop(stream.id, None)
        self._held_up.pop(stream.id, None)
        stream.connection = None
        if not self._streams:
            self.idle.set()
            if not self.usable:
                self._transport.close()
        stream.on_end(how)

    def _end_all(self, why: str) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, Ended(14, why))

    def _fail(self, why: str) -> None:
        self._flush()  # h2 tells the server why
        self.usable = False
        self._end_all(why)
        self._transport.abort()


class _Draining(H2ConnectionStateMachine):
    """Streams go on after the server's GOAWAY (RFC 9113, 6.8), which h2 4.4 takes for the end of the connection."""

    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        return [] if input_ is ConnectionInputs.RECV_GOAWAY else super().process_input(input_)
