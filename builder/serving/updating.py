"""`builder serve --auto-update`: serves what a link names, and a new version when the link moves, losing no request.

Each version has a `builder serve --no-gateway` of its own, so both run for a while. When the new one generates tokens,
the gateway sends new requests there. The old one stops after the last request that began on it. The APIs by which
Triton loads models stay closed in both: only who can write to the output directory can change what is served.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from builder.core import exit_status, interrupts, process
from builder.core.environment import child_environment
from builder.core.errors import BuilderError, ServingError
from builder.core.output import Output
from builder.gateway.routes import Routes, State
from builder.gateway.settings import Place
from builder.serving import health
from builder.serving.gateway import Gateway
from builder.serving.launch import Addresses, Ports
from builder.serving.readiness import answers_ok

LOOK_SECONDS = 0.5
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

    @property
    def key(self) -> str:
        """The repository's key."""
        return self.repository.name

    def is_ready(self) -> bool:
        """Whether each of its models that takes text generates a token."""
        url = self.addresses.http_url
        return answers_ok(url, "/v2/health/ready") and not health.fault(url, PROBE_SECONDS)

    def check_running(self) -> None:
        """ServingError if its process has ended."""
        if self.child.poll() is not None:
            raise ServingError(
                f"The server of version {self.key} {exit_status.describe(self.child.returncode)}.",
                why=process.tail(self.log),
                hint=f"Its log: {self.log}",
            )


@dataclass
class Updating:
    """Serves the versions of one link.

    link: in models/. places: where the models of a repository are for clients, if it is served at a gRPC address; it
    raises a BuilderError if they can't be served. fits: raises one if two versions do not fit beside each other.
    options: of each `builder serve`. host: of Triton's ports. front: starts the gateway, which reads the given file of
    routes. show: prints the addresses. directory: for logs and routes.
    """

    link: Path
    places: Callable[[Path, str], tuple[Place, ...]]
    fits: Callable[[Path, Path], None]
    options: Sequence[str]
    host: str
    front: Callable[[Version, Path], AbstractContextManager[Gateway]]
    show: Callable[[Version, Gateway], None]
    directory: Path
    out: Output
    _number: int = 0
    _next: Version | None = None
    _failed: Path | None = None
    _started: int = 0
    _old: list[Version] = field(default_factory=list)

    def run(self) -> int:
        """Serves until interrupted (0). ServingError if the server or the gateway fails."""
        with ExitStack() as opened, ExitStack() as front:  # the gateway ends first: its requests need the servers
            self._current = self._start(opened)
            while not self._current.is_ready():
                self._current.check_running()
                time.sleep(LOOK_SECONDS)
            self._write(self._current)
            gateway = front.enter_context(self.front(self._current, self.directory / "routes.json"))
            self._sleep = gateway.sleep
            try:
                self.show(self._current, gateway)
                while True:
                    self._sleep(LOOK_SECONDS)
                    self._current.check_running()
                    self._look(opened)
            except KeyboardInterrupt:
                interrupts.answered()
                self.out.info("stopping; requests in flight are finished")
                return 0

    def _look(self, opened: ExitStack) -> None:
        """Starts, switches to and stops servers, as far as that is possible now."""
        target = self.link.resolve()
        if self._next and target != self._next.repository:  # it moved once more
            self._stop(self._next)
            self._next = None
        if self._next is None and target not in (self._current.repository, self._failed):
            self._begin(target, opened)
        elif self._next:
            self._proceed(self._next)
        if target == self._current.repository:
            self._failed = None
        in_use = self._state().in_use
        for version in self._old:
            if version.stopped is None and version.addresses.grpc_url not in in_use:
                self._stop(version)
        self._collect()

    def _begin(self, target: Path, opened: ExitStack) -> None:
        try:
            self.fits(self._current.repository, target)
            self._next = self._start(opened)
        except (BuilderError, OSError) as error:  # such as a full disk: the version that is served goes on
            self._reject(target, error)
        else:
            self.out.info(f"{self.link.name}: starting version {target.name}; {self._current.key} goes on meanwhile")

    def _proceed(self, version: Version) -> None:
        """Switches to the new version once it answers; gives it up if its process has ended."""
        try:
            version.check_running()
            if not version.is_ready():
                return
            self._write(version)
        except (BuilderError, OSError) as error:
            self._give_up(version, error)
            return
        while (state := self._state()).number != self._number:  # a large tokenizer takes seconds to load
            self._sleep(0.05)
            self._current.check_running()
        if state.fault:  # the gateway stays with the current version
            self._give_up(version, ServingError(state.fault))
            return
        self._old.append(self._current)
        self._current, self._next = version, None
        self.out.info(f"{self.link.name}: version {version.key} is served")

    def _give_up(self, version: Version, error: BuilderError | OSError) -> None:
        self._reject(version.repository, error)
        self._stop(version)
        self._next = None

    def _reject(self, target: Path, error: BuilderError | OSError) -> None:
        self._failed = target
        self.out.warn(f"{self.link.name}: version {target.name} can't be served, so {self._current.key} stays: {error}")

    def _start(self, opened: ExitStack) -> Version:
        """Starts a server of what the link names now. UsageError or IntegrityError if it can't be served."""
        repository = self.link.resolve()
        addresses = Ports(host=self.host).choose()
        places = self.places(repository, addresses.grpc_url)
        ports = ("http", addresses.http), ("grpc", addresses.grpc), ("metrics", addresses.metrics)
        argv = [process.python(), "-m", "builder", "serve", str(repository), "--no-gateway", "--host", self.host]
        argv += [word for name, port in ports for word in (f"--{name}-port", str(port))] + [*self.options, "--quiet"]
        self._started += 1
        log = self.directory / f"{repository.name}-{self._started}.log"
        own = opened.enter_context(ExitStack())
        child = own.enter_context(_running(argv, log))
        return Version(repository, addresses, places, log, child, own)

    def _write(self, version: Version) -> None:
        self._number += 1
        Routes(self._number, version.places).write(self.directory / "routes.json")

    def _state(self) -> State:
        state = State.read(self.directory / "routes.json")
        return state or State(0, "", frozenset([self._current.addresses.grpc_url]))

    def _stop(self, version: Version) -> None:
        """Tells a server to stop, and does not wait."""
        version.stopped = time.monotonic()
        if version.child.poll() is None:
            version.child.terminate()
        if version not in self._old:
            self._old.append(version)

    def _collect(self) -> None:
        """Ends what is left of the servers that have stopped, or had the time to."""
        for version in list(self._old):
            if version.stopped is None:
                continue
            if version.child.poll() is not None or time.monotonic() > version.stopped + STOP_SECONDS:
                if version.child.poll() is None:
                    process.kill(version.child)  # it had its time: closing it must not wait as long once more
                version.opened.close()
                if version.repository != self._failed:  # a message refers to that log
                    version.log.unlink(missing_ok=True)
                self._old.remove(version)
                self.out.info(f"{self.link.name}: the server of version {version.key} has stopped")


@contextmanager
def _running(argv: Sequence[str], log: Path) -> Iterator[process.Child]:
    with open(log, "wb") as sink, process.supervised(argv, stop=_terminate, log=sink, env=child_environment()) as child:
        yield child


def _terminate(child: process.Child) -> None:
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
