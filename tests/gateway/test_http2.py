"""The gateway's gRPC streams against gRPC's own server, and against bytes that are cut or damaged."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.gateway.channel import Channel
from builder.gateway.http2 import BrokenStreamError, Connection, Ended, Stream

METHOD = "/test.Test/Stream"
Handler = Callable[[bytes, grpc.aio.ServicerContext], AsyncIterator[bytes]]


class Call:
    """A stream with what it received."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.stream = Stream(self.messages.append, self.ended.set_result)


@asynccontextmanager
async def server(handle: Handler, port: int = 0) -> AsyncIterator[tuple[int, grpc.aio.Server]]:
    """gRPC's server with one method; its port."""

    class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            async def answers(requests: Any, context: Any) -> Any:
                async for request in requests:
                    async for response in handle(request, context):
                        yield response

            return grpc.stream_stream_rpc_method_handler(answers)

    running = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
    running.add_generic_rpc_handlers((Service(),))
    port = running.add_insecure_port(f"127.0.0.1:{port}")
    await running.start()
    try:
        yield port, running
    finally:
        await running.stop(None)


async def echo(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    count = int(request[:4])
    for number in range(count):
        yield b"%d " % number + request


async def fail(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    yield b"one"
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "größer als 100% möglich")


async def wait_for_ever(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    yield b"one"
    await asyncio.sleep(60)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(limited())


def test_many_streams_of_many_messages_at_once() -> None:
    async def work() -> None:
        async with server(echo) as (port, _):
            channel = Channel(f"127.0.0.1:{port}", METHOD)
            calls = [Call() for _ in range(40)]
            for number, call in enumerate(calls):
                await channel.begin(call.stream, b"0100 from %d" % number)
                call.stream.finish()
            for number, call in enumerate(calls):
                assert await call.ended == Ended(0, "")
                assert call.messages == [b"%d 0100 from %d" % (step, number) for step in range(100)]
            await channel.close(1)

    run(work)


@pytest.mark.parametrize("size", [0, 16379, 16384, 65535, 3_000_000])
def test_messages_of_any_size_in_both_directions(size: int) -> None:
    """More than a frame holds, and more than the server's window takes at once."""

    async def work() -> None:
        async with server(echo) as (port, _):
            channel = Channel(f"localhost:{port}", METHOD)
            request = b"0008" + bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            calls = [Call(), Call()]
            for call in calls:
                await channel.begin(call.stream, request)
                call.stream.finish()  # behind what is still to be sent
            for call in calls:
                assert (await call.ended).status == 0
                assert call.messages == [b"%d " % number + request for number in range(8)]
            await channel.close(1)

    run(work)


def test_the_servers_status_and_message() -> None:
    async def work() -> None:
        async with server(fail) as (port, _):
            channel = Channel(f"127.0.0.1:{port}", METHOD)
            for _ in range(3):  # a dynamic table of headers would show from the second on
                call = Call()
                await channel.begin(call.stream, b"")
                assert await call.ended == Ended(8, "größer als 100% möglich")
                assert call.messages == [b"one"]
            await channel.close(1)

    run(work)


def test_a_stream_that_is_cancelled_ends_in_the_server_and_harms_no_other() -> None:
    cancelled = []

    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield b"one"
        try:
            await asyncio.sleep(0.5 if request == b"stay" else 60)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        yield b"two"

    async def work() -> None:
        async with server(handle) as (port, _):
            channel = Channel(f"127.0.0.1:{port}", METHOD)
            leaver, stayer = Call(), Call()
            await channel.begin(leaver.stream, b"leave")
            await channel.begin(stayer.stream, b"stay")
            while not leaver.messages:
                await asyncio.sleep(0.01)
            leaver.stream.cancel()
            assert (await leaver.ended).status == 1
            stayer.stream.finish()
            assert (await stayer.ended).status == 0
            assert stayer.messages == [b"one", b"two"]
            assert cancelled == [b"leave"]
            await channel.close(1)

    run(work)


def test_a_server_that_restarts_is_connected_again() -> None:
    async def work() -> None:
        async with server(wait_for_ever) as (port, _):
            channel, lost = Channel(f"127.0.0.1:{port}", METHOD), Call()
            await channel.begin(lost.stream, b"")
            while not lost.messages:
                await asyncio.sleep(0.01)
        assert (await lost.ended).status != 0
        with pytest.raises(BrokenStreamError, match=str(port)):
            await channel.begin(Call().stream, b"")
        async with server(echo, port):
            call = Call()
            await channel.begin(call.stream, b"0001")
            call.stream.finish()
            assert (await call.ended).status == 0
            await channel.close(1)

    run(work)


def test_a_server_that_drains_ends_its_streams_and_takes_no_more() -> None:
    async def work() -> None:
        async with server(slow) as (port, running):
            channel, call = Channel(f"127.0.0.1:{port}", METHOD), Call()
            await channel.begin(call.stream, b"")
            call.stream.finish()
            while not call.messages:
                await asyncio.sleep(0.01)
            stopping = asyncio.ensure_future(running.stop(10))
            assert (await call.ended).status == 0
            assert call.messages == [b"one", b"two"]
            await stopping
            with pytest.raises(BrokenStreamError):
                await channel.begin(Call().stream, b"")
            await channel.close(1)

    async def slow(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.sleep(0.3)
        yield b"two"

    run(work)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00"]
)
def test_a_port_that_is_not_grpc(answer: bytes) -> None:
    """HTTP/1, a connection that closes at once, and a frame that is cut off."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def work() -> None:
        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        channel, call = Channel(f"127.0.0.1:{port}", METHOD), Call()
        await channel.begin(call.stream, b"")
        assert (await call.ended).status == 14
        listener.close()

    run(work)


class Transport:
    """Collects what a connection sends."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    abort = close


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


OK = b"\x88"  # a header block: status 200
STATUS = b"\x00\x0bgrpc-status\x010"  # a trailer: success


def padded(payload: bytes) -> bytes:
    return bytes([3]) + payload + bytes(3)


def connected(count: int) -> tuple[Connection, Transport, list[list[bytes]], list[Ended]]:
    """A connection with streams 1, 3, ...; what they received and how they ended."""
    connection, transport = Connection("host:1", METHOD), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    received: list[list[bytes]] = [[] for _ in range(count)]
    ended: list[Ended] = []
    for messages in received:
        connection.begin(Stream(messages.append, ended.append), b"request")
    return connection, transport, received, ended


@given(
    messages=st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=300)), max_size=30),
    cuts=st.lists(st.integers(1, 60), min_size=1),
    sizes=st.lists(st.integers(0, 40), min_size=1),
    pad=st.booleans(),
)
@settings(max_examples=200)
def test_messages_do_not_depend_on_frames_and_reads(
    messages: list[tuple[int, bytes]], cuts: list[int], sizes: list[int], pad: bool
) -> None:
    """The bytes of the messages in frames of any sizes, and these in reads of any sizes."""
    connection, _, received, ended = connected(3)
    sent = frame(4, 0, 0, struct.pack(">HI", 4, 1 << 20)) + frame(99, 7, 0, b"unknown")
    for place in range(3):
        sent += frame(1, 4, 2 * place + 1, OK)
    for number, (place, message) in enumerate(messages):
        content = struct.pack(">BI", 0, len(message)) + message
        while content:
            size = sizes[number % len(sizes)] or len(content)
            piece, content = content[:size], content[size:]
            sent += frame(0, 8 if pad else 0, 2 * place + 1, padded(piece) if pad else piece)
    for place in range(3):  # a block in two parts
        sent += frame(1, 1 | (8 if pad else 0), 2 * place + 1, padded(STATUS[:5]) if pad else STATUS[:5])
        sent += frame(9, 4, 2 * place + 1, STATUS[5:])
    number = 0
    while sent:
        size = cuts[number % len(cuts)]
        connection.data_received(sent[:size])
        sent, number = sent[size:], number + 1
    assert received == [[message for place, message in messages if place == stream] for stream in range(3)]
    assert ended == [Ended(0, "")] * 3
    assert connection.idle.is_set()


FRAMES = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 99]),
    st.one_of(st.sampled_from([0, 1, 4, 5]), st.integers(0, 255)),
    st.integers(0, 7),
    st.one_of(st.sampled_from([b"\0\0\0\0\3one", b"\x88", b"\0\0\0\0", b""]), st.binary(max_size=60)),
)


@given(st.lists(FRAMES, max_size=12), st.binary(max_size=60), st.integers(0, 2), st.booleans())
@settings(max_examples=500)
def test_no_bytes_of_a_server_do_harm(
    frames: list[tuple[int, int, int, bytes]], rest: bytes, reaction: int, whole: bool
) -> None:
    """Each stream ends once, whatever it does on a message. Frames arrive in one read or one by one."""
    connection, transport = Connection("host:1", METHOD), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    ended: list[int] = []

    def begin(number: int) -> None:
        def react(message: bytes) -> None:
            (lambda: None, stream.finish, stream.cancel)[reaction]()

        stream = Stream(react, lambda how: ended.append(number))
        connection.begin(stream, b"request")

    for number in range(3):
        begin(number)
    reads = [frame(1, 4, id, OK) for id in (1, 3)] + [frame(*each) for each in frames] + [rest]
    for read in [b"".join(reads)] if whole else reads:
        connection.data_received(read)
    connection.connection_lost(None)
    assert sorted(ended) == [0, 1, 2]
    assert connection.idle.is_set()
    assert not connection.usable


def test_after_the_last_id_a_connection_takes_no_more_streams() -> None:
    connection, transport, _, ended = connected(1)
    connection._h2.highest_outbound_stream_id = (1 << 31) - 5
    connection.begin(Stream(lambda message: None, ended.append), b"")
    assert not connection.usable
    with pytest.raises(BrokenStreamError):
        connection.begin(Stream(lambda message: None, ended.append), b"")
    assert not transport.closed
    for id in (1, (1 << 31) - 3):
        connection.data_received(frame(3, 0, id, struct.pack(">I", 0)))
    assert len(ended) == 2
    assert transport.closed


def test_much_that_is_received_is_acknowledged() -> None:
    """Otherwise a stream would stand still after 16 MiB."""
    connection, transport, _, _ = connected(1)
    connection.data_received(frame(1, 4, 1, OK))
    message = struct.pack(">BI", 0, 16000) + bytes(16000)
    transport.written = b""
    for _ in range(1100):
        connection.data_received(frame(0, 0, 1, message))
    for stream in (b"\x00", b"\x01"):
        assert transport.written.count(b"\x00\x00\x04\x08\x00\x00\x00\x00" + stream) == 2  # after 8 MiB each
    assert len(transport.written) == 4 * 13


def test_streams_go_on_after_the_server_has_announced_its_end() -> None:
    """All in one read: GOAWAY, the PING that gRPC's servers send behind it, and a message."""
    connection, transport, received, ended = connected(3)
    sent = frame(1, 4, 1, OK) + frame(7, 0, 0, struct.pack(">II", 3, 0)) + frame(6, 0, 0, b"12345678")
    connection.data_received(sent + frame(0, 0, 1, b"\0\0\0\0\3one"))
    assert transport.written.endswith(frame(6, 1, 0, b"12345678"))
    assert (received, [how.status for how in ended]) == ([[b"one"], [], []], [14])
    with pytest.raises(BrokenStreamError):
        connection.begin(Stream(lambda message: None, ended.append), b"")
    connection.data_received(frame(1, 5, 1, STATUS) + frame(3, 0, 3, struct.pack(">I", 2)))
    assert [how.status for how in ended] == [14, 0, 14]
    assert transport.closed


def test_a_server_that_takes_no_more_streams_at_once() -> None:
    connection, _, _, _ = connected(1)
    connection.data_received(frame(4, 0, 0, struct.pack(">HI", 3, 1)))
    with pytest.raises(BrokenStreamError, match="1"):
        connection.begin(Stream(lambda message: None, lambda how: None), b"")
    connection.data_received(frame(1, 5, 1, OK + STATUS))
    connection.begin(Stream(lambda message: None, lambda how: None), b"")


@pytest.mark.parametrize(
    "sent",
    [
        frame(1, 4, 1, OK) + frame(0, 0, 1, b"\1\0\0\0\3one"),  # compressed
        frame(1, 4, 1, OK) + frame(0, 0, 1, b"\0\x7f\0\0\3one"),  # of 2 GiB
        frame(1, 0, 1, OK) + 100 * frame(9, 0, 1, bytes(10_000)),  # a header block without an end
        frame(1, 5, 1, OK + 17 * (b"\0\1x\x7f\x81\x1f" + bytes(4096))),  # headers of more than 64 KiB
        frame(1, 5, 1, OK + b"\0\x0bgrpc-status\1x"),
        frame(8, 0, 0, struct.pack(">I", (1 << 31) - 1)),  # a window of more than 2 GiB
        frame(5, 4, 1, struct.pack(">I", 2) + OK),  # a push
    ],
)
def test_what_a_server_may_not_send_ends_the_connection(sent: bytes) -> None:
    connection, transport, received, ended = connected(2)
    connection.data_received(sent)
    assert [how.status for how in ended] == [14, 14]
    assert received == [[], []]
    assert transport.closed
