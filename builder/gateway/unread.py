"""How much of what was sent to one connection its client has left unread, and for how long."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress

LOOKS = 8  # in the time that a client has to read something


class Unread:
    """Ends the connection once the client has read nothing for so many seconds; `on_stalled` gets the unread bytes.

    What counts is what is left, in the transport and in the kernel, where megabytes can wait: a client that reads
    slowly is slower than both, but each acknowledged packet is progress.
    """

    def __init__(self, transport: asyncio.WriteTransport, seconds: float, on_stalled: Callable[[int], None]) -> None:
        self._transport, self._seconds, self._on_stalled = transport, seconds, on_stalled
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._left, self._since = 0, 0.0  # bytes, and when there were more

    def start(self) -> None:
        """The kernel takes no more: from now on the client must read."""
        self.stop()
        self._left, self._since = self._bytes(), self._loop.time()
        self._next()

    def stop(self) -> None:
        """The kernel has taken all, or the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next(self) -> None:
        self._timer = self._loop.call_later(self._seconds / LOOKS, self._look)

    def _look(self) -> None:
        left, now = self._bytes(), self._loop.time()
        if left < self._left:
            self._left, self._since = left, now
        if now - self._since < self._seconds:
            self._next()
        else:
            self._timer = None
            self._on_stalled(left)
            self._drop()

    def _drop(self) -> None:
        """Ends the connection at once: closing it would wait for the client to read, in the transport or the kernel."""
        found = self._transport.get_extra_info("socket")
        with suppress(OSError):  # the client has just closed it
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _bytes(self) -> int:
        """Nothing is written while the kernel takes no more, so fewer bytes than before were read by the client."""
        own = self._transport.get_write_buffer_size()
        found = self._transport.get_extra_info("socket")
        try:
            # TIOCOUTQ of a TCP socket: bytes that the client has not acknowledged (Linux, man 7 tcp, SIOCOUTQ).
            (queued,) = struct.unpack("i", fcntl.ioctl(found.fileno(), termios.TIOCOUTQ, bytes(4)))
        except OSError:  # a kernel without it: then only what waits in the transport tells
            return own
        return own + int(queued)
