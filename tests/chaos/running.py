"""One run of a command: started, disturbed at a chosen moment, waited for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import processes

LAUNCH = Path(__file__).with_name("launch.py")
TIMEOUT = 420.0  # seconds after which a command hangs, also on a machine that is very busy
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Signal:
    """A disturbance: SIG`name` to the `process`, its `group` or a `child` of it, at a moment.

    Moments: `time:1.25` (seconds after `main` began), `operation:17` (before its 17th change of the file system),
    `stub:2+0.4` (0.4 s after the second process of Triton's Python backend was seen).
    """

    name: str
    to: str
    moment: str

    @property
    def number(self) -> int:
        return int(signal.Signals[f"SIG{self.name}"])


@dataclass(frozen=True)
class Finished:
    """What became of a command. `hit` is when the signal came: "" for never, else "starting", "running" or "ending"."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    operations: tuple[str, ...]
    hit: str
    hung: bool


def _heed_signals() -> None:
    """A shell's background job ignores SIGINT, and `nohup` SIGHUP; what we start would inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """A command that is running. `until`: text on stdout at which it gets SIGTERM, for `serve`, which never ends."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], logs: Path, sent: Signal | None = None, until: str = ""
    ) -> None:
        self.sent, self.until = sent, until
        self._at_operation = sent is not None and sent.moment.startswith("operation:")
        self._files = [logs / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        read, write = os.pipe()
        self._pipe, self._told = read, b""
        operation = sent.moment.partition(":")[2] if sent and self._at_operation else "0"
        number, to = (sent.number, sent.to) if sent else (0, "process")
        with open(self._files[0], "wb") as stdout, open(self._files[1], "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCH), str(write), operation, str(number), to, "--", *argv],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=dict(env), pass_fds=[write],
                start_new_session=True, cwd=env["HOME"], preexec_fn=_heed_signals,
            )  # fmt: skip
        os.close(write)
        self._start = time.monotonic()
        self._began: float | None = None
        self._hit = ""
        self._told_to_stop = False

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        """Until it ends. After `timeout` seconds it is killed and counts as hung."""
        hung = False
        while self.process.poll() is None:
            self._listen(0.01)
            self._disturb()
            self._stop_when_ready()
            if time.monotonic() - self._start > timeout:
                hung = True
                self.process.kill()
                self.process.wait()
        took = time.monotonic() - self._start
        self._listen(0)
        os.close(self._pipe)
        last = next((line for line in self._told.decode().splitlines() if line.startswith("end")), "")
        if self._at_operation and self.sent and len(last.split()) - 1 < int(self.sent.moment.partition(":")[2]):
            self._hit = "" if last else "running"
        elif self._at_operation:
            self._hit = "running"
        stdout, stderr = (file.read_text(errors="replace") for file in self._files)
        return Finished(self.process.returncode, stdout, stderr, took, tuple(last.split()[1:]), self._hit, hung)

    @property
    def phase(self) -> str:
        """Whether `main` has begun, is running or has returned."""
        if b"end" in self._told:
            return "ending"
        return "running" if b"start" in self._told else "starting"

    def _listen(self, patience: float) -> None:
        if select.select([self._pipe], [], [], patience)[0]:
            data = os.read(self._pipe, 1 << 16)
            self._told += data
            if not data:
                time.sleep(patience)  # the pipe is closed: it is about to end
        if self._began is None and b"start" in self._told:
            self._began = time.monotonic()

    def _disturb(self) -> None:
        """Sends the signal if its moment has come."""
        if self.sent is None or self._at_operation or self._hit or not self._moment_has_come(self.sent.moment):
            return
        pid = self.process.pid
        if self.sent.to == "child":
            children = processes.descendants(pid)
            if not children:
                return  # at the next look
            # The newest: the one that does the work, behind any that only watch.
            pid = children[-1].pid
        self._hit = self.phase
        try:
            (os.killpg if self.sent.to == "group" else os.kill)(pid, self.sent.number)
        except ProcessLookupError:
            self._hit = ""

    def _moment_has_come(self, moment: str) -> bool:
        kind, _, value = moment.partition(":")
        if kind == "time":
            return self._began is not None and time.monotonic() - self._began >= float(value)
        count, _, delay = value.partition("+")
        stubs = [p for p in processes.descendants(self.process.pid) if STUB in p.command]
        if len(stubs) < int(count):
            return False
        time.sleep(float(delay))
        return True

    def _stop_when_ready(self) -> None:
        """SIGTERM once `until` stands on stdout, or after a disturbance that was to end the command and did not."""
        if self._told_to_stop or not self.until:
            return
        ready = self.until in self._files[0].read_text(errors="replace")
        disturbed = self.sent is None or bool(self._hit)
        late = self._began is not None and time.monotonic() - self._began > 40
        if ready and (disturbed or late):
            if self.sent:
                time.sleep(1)  # a disturbed server may be ending by itself
            self._told_to_stop = True
            self.process.terminate()
