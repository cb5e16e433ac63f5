"""`builder serve --auto-update`: serves what a link names, and a new version when the link moves, losing no request.

Each version has a `builder serve --no-gateway` of its own, so both run for a while. When the new one generates tokens,
the gateway sends new requests there. The old one stops after the last request that began on it. The APIs by which
Triton loads models stay closed in both: only who can write to the output directory can change what is served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from builder.core import interrupts, process
from builder.core.errors import BuilderError, ServingError
from builder.core.output import Output
from builder.core.store import replace_file
from builder.gateway.routes import Routes, State
from builder.gateway.settings import Place
from builder.serving.gateway import Gateway
from builder.serving.launch import Ports
from builder.serving.version import STOP_SECONDS, Version, running

LOOK_SECONDS = 0.5
WATCHDOG = "watchdog.json"  # for the gateway: of the server of the current version


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
    _seen: str = ""
    _old: list[Version] = field(default_factory=list)

    def run(self) -> int:
        """Serves until interrupted (0). ServingError if the server or the gateway fails."""
        # The gateway ends first: its requests need the servers. These are then told to stop, all at once.
        with ExitStack() as opened, ExitStack() as servers, ExitStack() as front:
            self._current = self._start(opened)
            servers.callback(self._tell_all)
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
        self._pass_on_events()
        in_use = self._state().in_use
        for version in self._old:
            if version.stopped is None and version.addresses.grpc_url not in in_use:
                self._stop(version)
        self._collect()

    def _pass_on_events(self) -> None:
        """Shows what the watchdogs of the servers log; the gateway gets what that of the current one has seen."""
        for version in filter(None, (self._current, self._next, *self._old)):
            for event in version.events():
                self.out.warn(f"version {version.key}: {event}")
        with suppress(FileNotFoundError, BuilderError):  # there is none yet, or the disk is full
            seen = self._current.watchdog.read_text(encoding="utf-8")
            if seen != self._seen:
                replace_file(self.directory / WATCHDOG, seen)
                self._seen = seen

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
        self._started += 1
        log = self.directory / f"{repository.name}-{self._started}.log"
        argv += [word for name, port in ports for word in (f"--{name}-port", str(port))]
        argv += [*self.options, "--watchdog", str(log.with_suffix(".json")), "--quiet"]
        own = opened.enter_context(ExitStack())
        version = Version(repository, addresses, places, log, own.enter_context(running(argv, log)), own)
        own.callback(version.end)
        return version

    def _tell_all(self) -> None:
        for version in filter(None, (self._current, self._next, *self._old)):
            version.tell()

    def _write(self, version: Version) -> None:
        self._number += 1
        Routes(self._number, version.places).write(self.directory / "routes.json")

    def _state(self) -> State:
        state = State.read(self.directory / "routes.json")
        return state or State(0, "", frozenset([self._current.addresses.grpc_url]))

    def _stop(self, version: Version) -> None:
        """Tells a server to stop, and does not wait."""
        version.tell()
        if version not in self._old:
            self._old.append(version)

    def _collect(self) -> None:
        """Ends what is left of the servers that have stopped, or had the time to."""
        for version in list(self._old):
            if version.stopped is None:
                continue
            if version.child.poll() is not None or time.monotonic() > version.stopped + STOP_SECONDS:
                version.opened.close()
                version.watchdog.unlink(missing_ok=True)
                if version.repository != self._failed:  # a message refers to that log
                    version.log.unlink(missing_ok=True)
                self._old.remove(version)
                self.out.info(f"{self.link.name}: the server of version {version.key} has stopped")
