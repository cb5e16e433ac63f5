"""A server that fails is started again on the same ports, a few times: real Triton, with the smallest repository."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from builder.core.errors import ServingError
from builder.core.output import Output
from builder.gateway.watchdog import WatchdogCollector
from builder.serving import watchdog
from builder.serving.foreground import Either, Foreground
from builder.serving.launch import Ports
from builder.serving.readiness import answers_ok
from builder.serving.server import serve
from builder.serving.watchdog import Watchdog
from tests.serving.test_server import one_model

BROKEN = ServingError("The server was killed by SIGKILL.", hint="Its log: x")


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PAUSES", (0.1, 0.1))
    models = one_model(tmp_path / "models")
    running: list[Either] = []
    shown: list[str] = []

    class Started(AbstractContextManager[Either]):
        def __init__(self, ports: Ports | None) -> None:
            self.made = serve(models, out=Output("quiet"), log=tmp_path / "log", ports=ports)

        def __enter__(self) -> Either:
            running.append(self.made.__enter__())
            return running[-1]

        def __exit__(self, *error: Any) -> Any:
            return self.made.__exit__(*error)

    def kill_each() -> None:
        for number in range(3):
            eventually(lambda number=number: len(running) > number)  # type: ignore[misc]
            [triton] = running[number].draining.servers()  # type: ignore[union-attr]
            assert answers_ok(running[number].http_url, "/v2/health/ready")
            os.kill(triton, signal.SIGKILL)

    killer = threading.Thread(target=kill_each)
    killer.start()
    foreground = Foreground(
        Started, lambda *_: nullcontext(), lambda server, _: shown.append(server.http_url), tmp_path, Output("quiet")
    )
    with pytest.raises(ServingError, match=r"The server was killed by SIGKILL.") as caught:
        foreground.run()
    killer.join()
    assert "It was started again 2 times within 10 minutes." in caught.value.why
    assert [server.http_url for server in running] == shown * 3, "the addresses stay, and are printed once"
    assert json.loads((tmp_path / "watchdog.json").read_text())["restarts"] == 2


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
