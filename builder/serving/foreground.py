"""`builder serve`: a server with a gateway in front of it, until an interrupt. A server that fails is started again.

The gateway stays meanwhile: it answers 503, and its readiness says why. Whatever was in progress on the server is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from builder.core import exit_status, interrupts
from builder.core.errors import ServingError
from builder.core.output import Output
from builder.serving import health
from builder.serving.container import ContainerServer
from builder.serving.gateway import Gateway
from builder.serving.launch import Ports
from builder.serving.recovery import Recovery
from builder.serving.server import Server
from builder.serving.watchdog import Watchdog

Either: TypeAlias = Server | ContainerServer


@dataclass
class Foreground:
    """start: starts a server, on the ports of the one before if there was one. front: starts the gateway for a server;
    it gets the log to write, and the watchdog's file to read. show: prints the addresses. directory: for these files.
    watchdog: by default one that writes its file there and tells `out`.
    """

    start: Callable[[Ports | None], AbstractContextManager[Either]]
    front: Callable[[Either, Path, Path], AbstractContextManager[Gateway | None]]
    show: Callable[[Either, Gateway | None], None]
    directory: Path
    out: Output
    watchdog: Watchdog | None = None
    _ports: Ports | None = None
    _gateway: Gateway | None = None
    _opened: ExitStack = field(default_factory=ExitStack)

    def run(self) -> int:
        """Serves until interrupted (0). ServingError if the server or the gateway failed for good."""
        watchdog, pause = self.watchdog or Watchdog(self.directory / "watchdog.json", self.out.warn), 0.0
        with self._opened:
            while True:
                try:
                    if pause:
                        self._pause(pause)
                    with self.start(self._ports) as server:
                        return self._serve(server, watchdog)
                except KeyboardInterrupt:
                    if self._ports is None:
                        raise
                    interrupts.answered()  # while it was started again
                    return 0
                except ServingError as error:
                    if self._ports is None or self._gateway_ended():
                        raise
                    pause = watchdog.restart(error)

    def _serve(self, server: Either, watchdog: Watchdog) -> int:
        """Watches a server that is ready until an interrupt. ServingError if it fails."""
        first = self._ports is None
        if first:
            front = self.front(server, self.directory / "gateway.log", watchdog.file)
            self._gateway = self._opened.enter_context(front)
        try:  # an interrupt while the addresses are printed stops the server like a later one
            if first:
                self.show(server, self._gateway)
            if server.processes:  # that of a container is started again there
                self._ports = _ports(server)
            watchdog.up()
            code = self._watch(server, watchdog)
        except KeyboardInterrupt:
            interrupts.answered()
            self.out.info("stopping; requests in flight are finished")
            if server.draining:
                server.draining.begin()
            self._opened.close()  # the gateway first: its requests need the server
            return 0
        raise ServingError(f"The server {exit_status.describe(code)}.", hint=f"Its log: {server.log}")

    def _watch(self, server: Either, watchdog: Watchdog) -> int:
        """The exit code of a server that exits. ServingError if it does not answer, or the gateway exits."""
        recovery = Recovery(server.http_url, server.processes, watchdog) if server.processes else health.no_recovery
        wait = self._gateway.watched(server.wait) if self._gateway else server.wait
        try:
            return health.watch(server.http_url, wait, recovery, watchdog.probed)
        except ServingError:
            if server.draining and not self._gateway_ended():
                server.draining.give_up()
            raise

    def _gateway_ended(self) -> bool:
        return self._gateway is not None and self._gateway.child.poll() is not None

    def _pause(self, seconds: float) -> None:
        """Waits before a restart. ServingError if the gateway exits meanwhile: nothing would need the server."""
        wait = self._gateway.sleep if self._gateway else time.sleep
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            wait(min(left, 0.1))


def _ports(server: Either) -> Ports:
    """The ports of a server, for the next one."""
    (host, http), (_, grpc), (_, metrics) = (
        url.rsplit(":", 1) for url in (server.http_url, server.grpc_url, server.metrics_url)
    )
    return Ports(int(http), int(grpc), int(metrics), host)
