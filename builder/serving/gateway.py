"""Starts the gateway in front of a server, as a process that ends with this one, and watches it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import exit_status, process
from builder.core.environment import child_environment
from builder.core.errors import ServingError
from builder.gateway.limits import DRAIN_SECONDS
from builder.gateway.listener import authority, listen
from builder.serving.readiness import answers_ok
from builder.serving.server import follow

START_SECONDS = 120.0  # a large tokenizer takes seconds to load; a busy machine takes longer
KILL_SECONDS = 5  # for it to exit after that


@dataclass(frozen=True)
class Gateway:
    """A gateway that answers. `url` is what OpenAI's clients call base_url."""

    url: str
    log: Path
    child: process.Child

    def check_running(self) -> None:
        """ServingError if it has exited."""
        if (code := self.child.poll()) is not None:
            raise ServingError(
                f"The gateway {exit_status.describe(code)}.",
                why=process.tail(self.log),
                hint=f"Its log: {self.log}",
            )

    def watched(self, wait: Callable[[float], int | None]) -> Callable[[float], int | None]:
        """`wait`, which waits for the server's exit, but raising ServingError if the gateway exits."""

        def both(timeout: float) -> int | None:
            code = wait(timeout)
            if code is None:
                self.check_running()
            return code

        return both

    def sleep(self, seconds: float) -> None:
        """Waits so long. ServingError if it exits meanwhile."""
        time.sleep(seconds)
        self.check_running()


@contextmanager
def gateway(
    repository: Path,
    grpc: str,
    address: tuple[str, int | None],
    *,
    log: Path,
    options: Sequence[str] = (),
    follow_log: bool = False,
) -> Iterator[Gateway]:
    """Runs `builder gateway` for the server at `grpc` while the block runs.

    `address` is host and port to listen on; without a port a free one is chosen. `options` are further options of that
    command. ServingError if the port is in use or the gateway does not start.
    """
    host, port = address
    with listen(host, port) as listener:  # closed again for the gateway, which opens it in a moment
        chosen = listener.getsockname()[1]
    argv = [process.python(), "-m", "builder", "gateway", str(repository), "--grpc", grpc, "--host", host]
    argv += ["--port", str(chosen), "--drain", str(DRAIN_SECONDS), "--json", *options]
    with (
        open(log, "wb") as sink,
        process.supervised(argv, stop=_stop, log=sink, env=child_environment("gateway")) as child,
    ):
        if follow_log:
            follow(log)
        # An address that means all of them is none to connect to.
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        _wait_until_live(child, authority(local, chosen), log)
        yield Gateway(f"http://{authority(host, chosen)}/v1", log, child)


def _wait_until_live(child: process.Child, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers_ok(url, "/health/live"):
        if child.poll() is not None:
            raise ServingError(
                f"The gateway {exit_status.describe(child.returncode)} before it answered.",
                why=process.tail(log),
                hint="To serve without it: --no-gateway",
            )
        if time.monotonic() > deadline:
            raise ServingError("The gateway does not answer.", why=process.tail(log), hint=f"Its log: {log}")
        time.sleep(0.1)


def _stop(child: process.Child) -> None:
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(DRAIN_SECONDS + KILL_SECONDS)
