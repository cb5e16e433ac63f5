"""The gateway's listening socket. Imports nothing of the gateway, so that `serve` can choose a port with it."""

from __future__ import annotations

import socket

from builder.core.errors import ServingError

BACKLOG = 2048


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket; a free port if none is given. ServingError if the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port or 0), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ServingError(
            f"Can't listen on {host}:{port}.",
            why=error.strerror or str(error),
            hint="Choose another port for the gateway with --port.",
        ) from error
