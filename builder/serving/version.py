"""One of the servers of `builder serve --auto-update`: a `builder serve --no-gateway` of one version."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import exit_status, process
from builder.core.environment import child_environment
from builder.core.errors import ServingError
from builder.gateway.settings import Place
from builder.serving import health
from builder.serving.launch import Addresses
from builder.serving.readiness import answers_ok

STOP_SECONDS = 60.0  # for a server to stop: its own limit for requests in flight is 30
PROBE_SECONDS = 10.0  # for a token of each model of a new version, on a server without other requests


@dataclass(eq=False)
class Version:
    """A server of one repository. places: of its models. stopped: when it was told to stop, by time.monotonic."""

    repository: Path
    addresses: Addresses
    places: tuple[Place, ...]
    log: Path
    child: process.Child
    opened: ExitStack
    stopped: float | None = None
    _read: int = 0

    @property
    def watchdog(self) -> Path:
        """What its watchdog has seen."""
        return self.log.with_suffix(".json")

    def events(self) -> list[str]:
        """What its watchdog has logged since the last call."""
        try:
            with open(self.log, "rb") as log:
                log.seek(self._read)
                new = log.read()
        except FileNotFoundError:  # whoever tidies up a directory of temporary files must not end the service
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.decode("utf-8", "replace").splitlines()
        return [line.removeprefix("warning").strip() for line in lines if line.startswith("warning ")]

    @property
    def key(self) -> str:
        """The repository's key."""
        return self.repository.name

    def is_ready(self) -> bool:
        """Whether each of its models that takes text generates a token."""
        url = self.addresses.http_url
        return answers_ok(url, "/v2/health/ready") and not health.fault(url, PROBE_SECONDS)

    def tell(self) -> None:
        """Tells the server to stop, once: a second signal would cut off what it is still doing. Does not wait."""
        if self.stopped is None:
            self.stopped = time.monotonic()
            if self.child.poll() is None:
                self.child.terminate()

    def end(self) -> None:
        """Stops the server, and kills it if it has not ended in time."""
        self.tell()
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(max(0.0, (self.stopped or 0.0) + STOP_SECONDS - time.monotonic()))
        if self.child.poll() is None:
            process.kill(self.child)

    def check_running(self) -> None:
        """ServingError if its process has ended."""
        if self.child.poll() is not None:
            raise ServingError(
                f"The server of version {self.key} {exit_status.describe(self.child.returncode)}.",
                why=process.tail(self.log),
                hint=f"Its log: {self.log}",
            )


@contextmanager
def running(argv: Sequence[str], log: Path) -> Iterator[process.Child]:
    """Runs `builder serve` while the block runs. Version.end stops it; whatever is left is killed."""
    with open(log, "wb") as sink, process.supervised(argv, stop=_no_more, log=sink, env=child_environment()) as child:
        yield child


def _no_more(child: process.Child) -> None:
    pass
