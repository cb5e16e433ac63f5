"""Every process that a trial started, however it detached itself.

The harness is a subreaper (prctl(2)): an orphan of any of its descendants becomes its child, in whatever session or
process group it is. So whatever is left of a trial is found by walking down from here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Process:
    """A row of the process table. `state` is ps(1)'s letter; `command` is the command line."""

    pid: int
    parent: int
    state: str
    command: str


def become_subreaper() -> None:
    """From now on orphans among our descendants become our children."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int) -> list[Process]:
    """All living processes below `root`, oldest pid first. Zombies are dead, so they do not count."""
    table = _table()
    found: list[Process] = []
    parents = {root}
    while parents:
        children = [process for process in table if process.parent in parents]
        found += children
        parents = {child.pid for child in children}
    return sorted((process for process in found if process.state != "Z"), key=lambda process: process.pid)


def reap(keep: Collection[int] = ()) -> None:
    """Collects our dead children except those in `keep`, which somebody else waits for."""
    for process in _table():
        if process.parent == os.getpid() and process.state == "Z" and process.pid not in keep:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def left_after(patience: float, *, ignore: Collection[int] = ()) -> list[Process]:
    """What is still alive below us after `patience` seconds; returns as soon as nothing is."""
    deadline = time.monotonic() + patience
    while True:
        reap()
        left = [process for process in descendants(os.getpid()) if process.pid not in ignore]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def kill(processes: Collection[Process]) -> None:
    """SIGKILL to each."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _table() -> list[Process]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended while we looked
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                found.append(Process(int(entry.name), int(parent), state, b" ".join(words).decode(errors="replace")))
    return found
