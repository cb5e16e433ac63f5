"""A server's gRPC method, on a connection that is made when it is needed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from builder.gateway.http2 import BrokenStreamError, Connection, Stream

CONNECT_SECONDS = 10.0


class Channel:
    """Streams of one method of one server. Must be used in one event loop."""

    def __init__(self, address: str, path: str) -> None:
        self._address, self._path = address, path
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    async def begin(self, stream: Stream, message: bytes) -> None:
        """Begins a stream with the client's only message. BrokenStreamError if there is no connection."""
        if self._connection is None or not self._connection.usable:
            async with self._connecting:
                if self._connection is None or not self._connection.usable:
                    self._connection = await self._connect()
        self._connection.begin(stream, message)

    async def close(self, seconds: float) -> None:
        """Closes the connection, once its streams have ended or after so many seconds."""
        if self._connection is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._connection.idle.wait()
            self._connection.close()

    async def _connect(self) -> Connection:
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self._address, self._path), host.strip("[]"), int(port)
                )
        except (OSError, TimeoutError) as error:
            raise BrokenStreamError(f"{self._address}: {error or 'no connection in time'}") from None
        return connection
