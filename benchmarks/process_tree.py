"""What a command costs: wall and CPU seconds, and the most memory that its processes held at a time, all together.

    python -I -S benchmarks/process_tree.py COMMAND...    prints the figures as JSON

Linux counts the memory of the process that starts a command as the command's (fs/exec.c, setmax_mm_hiwater_rss), so a
small one starts it: this file, with no more of Python than it needs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SAMPLE_SECONDS = 0.02


class Cost(NamedTuple):
    """seconds: wall. cpu: seconds of all processes that were waited for. resident, anonymous: the most bytes at a time,
    sampled every 20 ms. Pages that processes share count for each; pages of mapped files are in `resident` only."""

    seconds: float
    cpu: float
    resident: int
    anonymous: int


def run(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """Runs a command and returns what it cost. Its output is shown only if it fails, and ends the benchmark then."""
    os.sync()  # the disk is idle, so that no command waits for what the one before it wrote
    with tempfile.TemporaryFile("w+") as output:
        supervisor = [sys.executable, "-I", "-S", __file__, *argv]
        done = subprocess.run(supervisor, stdout=subprocess.PIPE, stderr=output, text=True, env=env)
        if done.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(argv)} failed with {done.returncode}:\n{output.read()[-4000:]}")
    return Cost(*json.loads(done.stdout))


def run_until(argv: Sequence[str], reached: Callable[[], bool], env: Mapping[str, str] | None = None) -> float:
    """Kills a command with all its processes as soon as `reached` is true. Returns the seconds until then."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(argv, stdout=output, stderr=output, env=env) as child:
        while not reached():
            if child.poll() is not None:
                output.seek(0)
                raise SystemExit(f"{' '.join(argv)} ended before it was killed:\n{output.read()[-4000:]}")
            time.sleep(SAMPLE_SECONDS / 2)
        seconds = time.perf_counter() - start
        for pid in processes(child.pid):
            os.kill(pid, signal.SIGKILL)
    return seconds


def processes(pid: int) -> list[int]:
    """A process and its descendants. Those that end meanwhile may be missing."""
    found = [pid]
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [one for child in file.read().split() for one in processes(int(child))]
    except OSError:
        pass
    return found


def memory(pid: int) -> tuple[int, int]:
    """(resident, anonymous) bytes of a process; zeros if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0, 0
    resident, mapped = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssFile"))
    return resident, resident - mapped


def supervise(argv: Sequence[str]) -> int:
    """Runs a command, prints its cost, and returns its exit code."""
    most = [0, 0]
    start = time.perf_counter()
    child = subprocess.Popen(argv, stdout=sys.stderr)
    ended = select.poll()
    ended.register(os.pidfd_open(child.pid))
    while not ended.poll(SAMPLE_SECONDS * 1000):
        now = [memory(pid) for pid in processes(child.pid)]
        most = [max(known, sum(one)) for known, one in zip(most, zip(*now, strict=True), strict=True)]
    seconds = time.perf_counter() - start
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, max(most[0], usage.ru_maxrss * 1024), most[1]]))
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
