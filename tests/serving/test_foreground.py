"""A server that fails is started again on the same ports, a few times: real Triton, with the smallest repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from builder.core.errors import ServingError
from builder.core.output import Output
from builder.gateway.watchdog import WatchdogCollector
from builder.serving import health, watchdog
from builder.serving.foreground import Either, Foreground
from builder.serving.gateway import Gateway
from builder.serving.launch import Ports
from builder.serving.readiness import answers_ok
from builder.serving.server import Server, serve
from builder.serving.watchdog import Watchdog
from tests.serving.test_server import one_model

BROKEN = ServingError("The server was killed by SIGKILL.", hint="Its log: x")


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Servers:
    """Starts servers of the smallest repository one after the other, and disturbs each as soon as it is ready."""

    def __init__(self, directory: Path, number: signal.Signals, last: int) -> None:
        self.running: list[Either] = []
        self.shown: list[str] = []
        self._models, self._log = one_model(directory / "models"), directory / "log"
        self._disturbing = threading.Thread(target=self._disturb, args=(number, last), daemon=True)
        self.foreground = Foreground(
            self.start, lambda *_: nullcontext(), lambda server, _: self.shown.append(server.http_url),
            directory, Output("quiet"),
        )  # fmt: skip

    @contextmanager
    def start(self, ports: Ports | None) -> Iterator[Either]:
        with serve(self._models, out=Output("quiet"), log=self._log, ports=ports) as server:
            self.running.append(server)
            yield server

    def run(self) -> ServingError:
        """The error with which `builder serve` gives up."""
        self._disturbing.start()
        with pytest.raises(ServingError) as caught:
            self.foreground.run()
        self._disturbing.join()
        return caught.value

    def _disturb(self, number: signal.Signals, last: int) -> None:
        for index in range(last):
            eventually(lambda index=index: len(self.running) > index)  # type: ignore[misc]
            server = self.running[index]
            assert isinstance(server, Server)
            assert answers_ok(server.http_url, "/v2/health/ready")
            for pid in server.draining.servers():
                os.kill(pid, number)


def test_a_server_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PAUSES", (0.1, 0.1))
    servers = Servers(tmp_path, signal.SIGKILL, last=3)
    error = servers.run()
    assert error.what == "The server was killed by SIGKILL."
    assert "It was started again 2 times within 10 minutes." in error.why
    assert [server.http_url for server in servers.running] == servers.shown * 3, "the addresses stay, printed once"
    assert json.loads((tmp_path / "watchdog.json").read_text())["restarts"] == 2


def failing(directory: Path, gateway: Gateway | None) -> Foreground:
    """A `builder serve` whose server can't be started again."""

    @contextmanager
    def start(ports: Ports | None) -> Iterator[Either]:
        raise BROKEN
        yield

    foreground = Foreground(start, lambda *_: nullcontext(), lambda *_: None, directory, Output("quiet"))
    foreground._ports, foreground._gateway = Ports(), gateway
    return foreground


def test_an_interrupt_before_a_restart_is_no_failure(tmp_path: Path) -> None:
    foreground = failing(tmp_path, None)
    threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    assert foreground.run() == 0


def test_a_gateway_that_ends_before_a_restart_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PAUSES", (60.0,))
    (tmp_path / "log").write_text("out of memory\n")
    with subprocess.Popen(["sleep", "0.3"]) as child:
        foreground = failing(tmp_path, Gateway("", tmp_path / "log", child))
        with pytest.raises(ServingError, match="The gateway") as caught:
            foreground.run()
    assert "out of memory" in caught.value.why


@pytest.mark.slow
def test_a_server_that_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PAUSES", (0.1,))
    monkeypatch.setattr(health, "PERIOD", 0.1)
    monkeypatch.setattr(health, "FAILURES", 1)
    servers = Servers(tmp_path, signal.SIGSTOP, last=2)
    start = time.monotonic()
    error = servers.run()
    assert error.what == "The server is running but no longer answers."
    assert "it does not answer, and is not ready" in error.why
    assert len(servers.running) == 2
    assert time.monotonic() - start < 60, "the hung server is not waited for"


def test_pauses_grow_and_old_restarts_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    dog = Watchdog(tmp_path / "watchdog.json", lines.append)
    assert [dog.restart(BROKEN) for _ in watchdog.PAUSES] == list(watchdog.PAUSES)
    assert lines[0] == "The server was killed by SIGKILL. It is started again in 1 s."
    with pytest.raises(ServingError, match="killed") as caught:
        dog.restart(BROKEN)
    assert (caught.value.exit_code, caught.value.hint) == (5, BROKEN.hint)
    monkeypatch.setattr(watchdog, "PERIOD_SECONDS", 0.0)
    assert dog.restart(BROKEN) == watchdog.PAUSES[0]


def test_each_event_is_a_line_and_a_metric(tmp_path: Path) -> None:
    lines: list[str] = []
    dog = Watchdog(tmp_path / "watchdog.json", lines.append)
    registry = CollectorRegistry()
    registry.register(WatchdogCollector(dog.file))
    assert not generate_latest(registry), "nothing without a watchdog"
    dog.up()
    dog.probed("")
    assert lines == []
    dog.probed("ensemble: HTTP 400")
    dog.replaced("preprocessing")
    dog.restart(BROKEN)
    found = dict(
        line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")
    )
    assert 0 <= float(found.pop("watchdog_probe_age_seconds")) < 10
    assert found == {
        "watchdog_probes_total": "2.0", "watchdog_failures_total": "1.0", "watchdog_replaced_total": "1.0",
        "watchdog_restarts_total": "1.0", "watchdog_server_up": "0.0",
    }  # fmt: skip
    dog.up()
    assert lines == [
        "A request for one token failed: ensemble: HTTP 400",
        "The process of preprocessing has ended. Triton loads the model again.",
        "The server was killed by SIGKILL. It is started again in 1 s.",
        "The server answers again.",
    ]


def test_a_full_disk_does_not_end_the_watchdog(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "file" / "watchdog.json", lambda line: None)
    (tmp_path / "file").touch()
    dog.probed("")
    assert dog.seen.probes == 1
