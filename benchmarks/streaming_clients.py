"""Clients that stream answers, with little CPU time of their own: from the gateway over HTTP, from Triton over gRPC."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2

from builder.gateway.channel import Channel
from builder.gateway.engine import METHOD
from builder.gateway.http2 import Ended, Stream

Ask = Callable[["Load"], Awaitable[None]]  # sends one request and adds what it measures


@dataclass
class Load:
    """Requests of clients that each send the next when the last is answered. ttft, seconds: of each request."""

    clients: int
    requests: int
    texts: list[str] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, text: str, started: float, first: float | None) -> None:
        """Adds an answer. `first`: when its first text came."""
        now = time.monotonic()
        self.texts.append(text)
        self.ttft.append((first or now) - started)
        self.seconds.append(now - started)


async def drive(ask: Callable[[], Awaitable[Ask]], load: Load, spread: float = 0.0) -> None:
    """Sends the requests. The clients begin within `spread` seconds, because clients that begin together and get
    answers of one length would for ever ask at the same moment."""
    waiting = list(range(load.requests))

    async def client(number: int) -> None:
        send = await ask()
        await asyncio.sleep(spread * number / load.clients)
        while waiting:
            waiting.pop()
            await send(load)

    await asyncio.gather(*(client(number) for number in range(load.clients)))


def over_http(port: int, request: dict[str, Any]) -> Callable[[], Awaitable[Ask]]:
    """A client of the gateway's /v1/completions."""
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def connect() -> Ask:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def ask(load: Load) -> None:
            started, first = time.monotonic(), None
            writer.write(head + body)
            parts = [await reader.read(1 << 16)]
            while parts[-1] and not parts[-1].endswith(b"0\r\n\r\n"):
                if first is None and b"data: " in parts[-1]:
                    first = time.monotonic()
                parts.append(await reader.read(1 << 16))
            load.add(events_text(b"".join(parts).partition(b"\r\n\r\n")[2]), started, first)

        return ask

    return connect


def events_text(chunked: bytes) -> str:
    """The text of a stream of events in HTTP chunks; what is no event is not counted."""
    events = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size, 16)
        events, chunked = events + rest[:length], rest[length + 2 :]
    found = [json.loads(event[6:]) for event in events.split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(choice["text"] for event in found for choice in event.get("choices", []))


def over_grpc(channel: Channel, model: str, prompt: str, tokens: int, *, stream: bool) -> Callable[[], Awaitable[Ask]]:
    """A client of a Triton model that takes text."""
    content = prompt.encode()
    message = service_pb2.ModelInferRequest(model_name=model)
    inputs = (("text_input", "BYTES", struct.pack("<I", len(content)) + content),
              ("max_tokens", "INT32", struct.pack("<i", tokens)), ("stream", "BOOL", bytes([stream])))  # fmt: skip
    for name, kind, raw in inputs:
        message.inputs.add(name=name, datatype=kind, shape=[1, 1])
        message.raw_input_contents.append(raw)
    message.outputs.add(name="text_output")
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    encoded = message.SerializeToString()

    async def connect() -> Ask:
        return lambda load: _ask_triton(channel, encoded, load)

    return connect


async def _ask_triton(channel: Channel, message: bytes, load: Load) -> None:
    started, pieces = time.monotonic(), []
    first: float | None = None
    ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    def receive(raw: bytes) -> None:
        nonlocal first
        response = service_pb2.ModelStreamInferResponse.FromString(raw)
        for output, content in zip(
            response.infer_response.outputs, response.infer_response.raw_output_contents, strict=False
        ):
            if output.name == "text_output" and len(content) > 4:
                first = first or time.monotonic()
                pieces.append(content[4:])
        final = response.infer_response.parameters["triton_final_response"].bool_param
        if response.error_message or final:
            stream.finish()

    stream = Stream(receive, ended.set_result)
    await channel.begin(stream, message)
    await ended
    load.add(b"".join(pieces).decode("utf-8", "replace"), started, first)


def triton_channel(address: str) -> Channel:
    """A connection to Triton. Must be made in the event loop that uses it."""
    return Channel(address, METHOD)
