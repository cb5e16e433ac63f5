"""Runs the gateway in this process until SIGTERM or SIGINT; requests in progress are finished."""

from __future__ import annotations

import gc
import math
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext

import uvicorn

from builder.gateway.app import application
from builder.gateway.listener import BACKLOG
from builder.gateway.protocol import limited
from builder.gateway.settings import Settings, read_models
from builder.gateway.telemetry import traces


def run(settings: Settings, listener: socket.socket, *, drain: int, ready: Callable[[], None]) -> None:
    """Serves until a signal. `drain`: seconds for requests in progress then. `ready` is called once, before serving.

    Errors as for Place.read, for the models that it serves first.
    """
    models, traced = read_models(settings.places), traces()
    app = application(settings, models, traced)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=limited(settings.limits, app.metrics.stalled.inc),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=math.ceil(settings.limits.idle_seconds),
        timeout_graceful_shutdown=drain,
    )
    gc.collect()
    gc.freeze()  # what was loaded so far is never garbage
    server = uvicorn.Server(config)
    # uvicorn would send itself the signal again at the end, and the exit code would be that of a failure.
    server.capture_signals = nullcontext
    previous = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ready()  # a signal that follows is handled, also before the first request
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if traced is not None:
            traced.close()
