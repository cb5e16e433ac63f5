"""The servers of `builder serve --auto-update`, with small programs in their place."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from builder.core.errors import ServingError
from builder.serving import version
from builder.serving.launch import Ports
from builder.serving.version import Version
from builder.serving.watchdog import Watchdog

# Says when it was told to stop, and takes a second for it. A second signal would end it at once, with an error.
SLOW = """
import signal, sys, time
def stop(*_):
    print("told", time.monotonic(), flush=True)
    time.sleep(1)
    print("ended", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(60)
"""


def started(opened: ExitStack, directory: Path, name: str, code: str = SLOW) -> Version:
    log = directory / f"{name}.log"
    own = opened.enter_context(ExitStack())
    child = own.enter_context(version.running([sys.executable, "-c", code], log))
    made = Version(directory / name, Ports().choose(), (), log, child, own)
    own.callback(made.end)
    deadline = time.monotonic() + 30
    while "ready" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return made


def test_servers_that_were_told_to_stop_stop_side_by_side(tmp_path: Path) -> None:
    with ExitStack() as opened:
        versions = [started(opened, tmp_path, name) for name in "abc"]
        for one in versions:
            one.tell()
            one.tell()
    assert [one.child.poll() for one in versions] == [0, 0, 0]
    logs = [one.log.read_text().split() for one in versions]
    assert [log.count("told") for log in logs] == [1, 1, 1]
    assert all(log[-1] == "ended" for log in logs)
    told = [float(log[log.index("told") + 1]) for log in logs]
    assert max(told) - min(told) < 0.9, "before the first one has ended"


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "STOP_SECONDS", 0.5)
    with ExitStack() as opened:
        one = started(opened, tmp_path, "a", SLOW.replace("sleep(1)", "sleep(60)"))
        start = time.monotonic()
    assert time.monotonic() - start < 20
    assert one.child.poll() is not None


def test_events_are_the_warnings_of_whole_lines(tmp_path: Path) -> None:
    with ExitStack() as opened:
        one = started(opened, tmp_path, "a")
        assert one.events() == []
        with open(one.log, "a") as log:
            log.write("warning     The process of x has ended.\nanother line\nwarning     half")
            log.flush()
            assert one.events() == ["The process of x has ended."]
            log.write(" a line\n")
            log.flush()
        assert one.events() == ["half a line"]


def test_a_log_that_was_removed_has_no_events(tmp_path: Path) -> None:
    with ExitStack() as opened:
        one = started(opened, tmp_path, "a")
        one.log.unlink()
        assert one.events() == []


def test_each_event_of_a_watchdog_is_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    watchdog = Watchdog(tmp_path / "watchdog.json", said.append)
    watchdog.restart(ServingError("It failed.", why="The end of its log:\n  one line\n  another"))
    assert said == ["It failed. The end of its log: one line another It is started again in 1 s."]
