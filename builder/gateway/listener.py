"""The gateway's listening socket. Imports nothing of the gateway, so that `serve` can choose a port with it."""

from __future__ import annotations

import errno
import socket

from builder.core.errors import ServingError

BACKLOG = 2048
# What waits in the kernel for a client that does not read, twice as much in all. By itself the kernel lets it grow to
# 4 MiB (net.ipv4.tcp_wmem): minutes of a stream, and much memory for many such clients.
SEND_BYTES = 128 << 10


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket; a free port if none is given. ServingError if the port is in use or the host is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port or 0), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ServingError(
            f"Can't listen on {host}:{port}." if port else f"Can't listen on {host}.",
            why=error.strerror or str(error),
            hint=_hint(error, port),
        ) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections inherit it
    return listener


def authority(host: str, port: int) -> str:
    """HOST:PORT as in a URL, where an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hint(error: OSError, port: int | None) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Find out what uses the port (ss -ltnp 'sport = :{port}'), or choose another one with --port."
    if error.errno == errno.EACCES:
        return "Ports below 1024 need privileges: choose a higher one with --port."
    return "--host takes an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them."
