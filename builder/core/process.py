"""Runs worker processes and other commands, each with its own log file, and none outlives its parent.

Heavy work runs in a process of its own so that its memory is returned to the system. Each command runs below a
supervisor (supervisor.py), whose process id and exit code stand in for the command's.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from builder.core import errors, exit_status, interrupts, supervisor, temporary, worker
from builder.core.environment import Kind, child_environment
from builder.core.errors import BuilderError, StageError

if TYPE_CHECKING:
    from builder.core.output import Output

FOLLOW_SECONDS = 0.2  # how often a process's log is polled for new lines
# How long a supervisor may take to kill its tree. It gives up by itself after 30 (supervisor.GIVE_UP_SECONDS).
SUPERVISOR_SECONDS = 40.0
Child: TypeAlias = "subprocess.Popen[bytes]"


@dataclass(frozen=True)
class Command:
    """A command to run. It gets the variables of our environment that its kind may have, and those in `env`."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    kind: Kind = "work"


@dataclass(frozen=True)
class Scratch:
    """What to remove after a command: shared memory whose names begin with `shm`, and a directory."""

    shm: str = ""
    directory: Path | None = None


@dataclass(frozen=True)
class Bar:
    """The progress bar of a job: where to draw it, its first label, and the unit that it counts."""

    out: Output
    label: str
    unit: str = ""


@dataclass(frozen=True)
class Finished:
    """A process that exited with 0: wall time in seconds, and its peak resident memory in bytes."""

    seconds: float
    max_rss: int


class Failed(StageError):
    """A process that did not exit with 0. `code`: exit code, negative signal number, or None if it timed out."""

    def __init__(self, what: str, *, log: Path, code: int | None = None, hint: str = "") -> None:
        super().__init__(what, why=tail(log), hint=f"{hint}The full log: {log}")
        self.code = code


@contextmanager
def supervised(
    argv: Sequence[str],
    *,
    stop: Callable[[Child], None],
    log: IO[bytes],
    env: Mapping[str, str],
    scratch: Scratch = Scratch(),
    **popen: Any,
) -> Iterator[Child]:
    """Runs a command in its own session while the block runs. `env` is its whole environment.

    When the block ends, in any way, `stop` is called to end the command; then every process that it started is killed
    and its shared memory removed. If this process is killed, the supervisor does the same, and also removes
    `scratch.directory`, which otherwise is the caller's to remove.
    FileNotFoundError if there is no such program.
    """
    if shutil.which(argv[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(f"There is no program {argv[0]}.")
    tree = f"{os.getpid()}-{secrets.token_hex(8)}"
    directory = str(scratch.directory) if scratch.directory else ""
    child: Child | None = None
    try:
        # A signal handler that raises inside of Popen would lose the process that has just been started.
        with interrupts.deferred():
            child = subprocess.Popen(
                [python(), "-I", "-S", supervisor.__file__, scratch.shm, directory, *argv],
                stdin=subprocess.PIPE,  # the kernel closes it when we exit, which tells the supervisor; see `kill`
                stdout=log,
                stderr=subprocess.STDOUT,
                # So that Ctrl-C reaches the command only through `stop`, and only once.
                start_new_session=True,
                env={**env, supervisor.MARK: tree},
                **popen,
            )
        yield child
    finally:
        if child is not None:
            try:
                stop(child)
            finally:
                _end(child, tree)
                supervisor.clean_up(scratch.shm)


def kill(child: Child) -> None:
    """Tells the supervisor to kill the command and all its descendants. Does not wait."""
    if child.stdin and not child.stdin.closed:
        with suppress(OSError):  # it has already exited
            os.write(child.stdin.fileno(), supervisor.KILL)
        child.stdin.close()


def _end(child: Child, tree: str) -> None:
    """Kills the command and its descendants and waits for them, even if the supervisor itself was killed."""
    kill(child)
    if child.returncode is None:
        try:
            child.wait(SUPERVISOR_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.returncode < 0:  # the supervisor repeats its command's signal, or was killed itself
        supervisor.kill_marked(tree)


@dataclass
class Running:
    """A command that runs. `on_event` receives the events that it emits from now on."""

    argv: Sequence[str]
    log: Path
    on_event: Callable[[dict[str, Any]], None]
    _start: float = field(default_factory=time.monotonic)
    _child: Child = field(init=False)
    _errors: list[dict[str, str]] = field(default_factory=list)
    _max_rss: int = 0
    _timed_out: bool = False

    def wait(self, limit: float | None = None) -> None:
        """Waits until it exits; after `limit` seconds it is killed."""
        with _limited(self._child, limit) as timed_out:
            _, status, usage = os.wait4(self._child.pid, 0)  # not Popen.wait, which does not return the memory used
        self._ended(status, usage.ru_maxrss)
        self._timed_out = timed_out.is_set()

    def poll(self) -> bool:
        """Whether it has exited. Does not wait."""
        pid, status, usage = os.wait4(self._child.pid, os.WNOHANG)
        if pid:
            self._ended(status, usage.ru_maxrss)
        return pid != 0

    def _ended(self, status: int, kilobytes: int) -> None:
        self._child.returncode, self._max_rss = os.waitstatus_to_exitcode(status), kilobytes * 1024  # getrusage(2)

    def kill(self) -> None:
        """Kills it and its descendants. Does not wait."""
        kill(self._child)

    def finished(self, limit: float | None = None) -> Finished:
        """What a command that has exited cost. Raises what `run` raises."""
        if self._timed_out:
            raise Failed(f"{Path(self.argv[0]).name} took more than {limit:.0f} s and was stopped.", log=self.log)
        if self._child.returncode != 0:
            raise _rebuilt(self._errors[-1]) if self._errors else _failure(self.argv, self._child.returncode, self.log)
        return Finished(time.monotonic() - self._start, self._max_rss)

    def receive(self, event: dict[str, Any]) -> None:
        """Receives an event from the command."""
        if "error" in event:
            self._errors.append(event["error"])
        else:
            self.on_event(event)


def run(
    command: Command,
    *,
    log: Path,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    on_line: Callable[[str], None] | None = None,
    limit: float | None = None,
) -> Finished:
    """Runs a command to its end, with stdout and stderr appended to `log`.

    `on_event` receives the events that a worker `emit`s, `on_line` each line of the log as it is written; both have
    received everything when this returns or raises.
    If the exit code is not 0, raises the error that the worker sent with `emit_error`, or else Failed with the last
    lines of the log. An interrupt sends SIGINT, and SIGKILL ten seconds later; `limit` seconds send SIGKILL.
    The command's TMPDIR is removed with it: what it was about to remove itself when it was killed is not left.
    """
    with started(command, log=log, on_event=on_event, on_line=on_line) as running:
        running.wait(limit)
    return running.finished(limit)


@contextmanager
def started(
    command: Command,
    *,
    log: Path,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    on_line: Callable[[str], None] | None = None,
    inherited: Sequence[int] = (),
) -> Iterator[Running]:
    """Runs a command while the block runs, as `run` does. `inherited`: descriptors that it gets."""
    running = Running(command.argv, log, on_event)
    with temporary.directory() as tmp:
        read_fd, write_fd = os.pipe()
        reader = threading.Thread(target=_read_events, args=(read_fd, running.receive), daemon=True)
        reader.start()
        env = {**_environment(command, tmp), worker.PROGRESS_FD: str(write_fd)}
        with open(log, "ab") as sink, os.fdopen(write_fd, "wb") as our_end:
            sink.write(f"$ {shlex.join(command.argv)}\n".encode())
            sink.flush()
            with (
                _followed(log, sink.tell(), on_line),
                supervised(
                    command.argv,
                    stop=_stop,
                    log=sink,
                    env=env,
                    scratch=Scratch(directory=tmp),
                    cwd=command.cwd,
                    pass_fds=[write_fd, *inherited],
                ) as running._child,
            ):
                our_end.close()  # so that the reader sees the end of file when the command exits
                yield running
        reader.join(timeout=5)


def _environment(command: Command, tmp: Path) -> dict[str, str]:
    """The command's variables. What torch compiles stays beside the command's TMPDIR, for the next command."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp.parent / f"torchinductor_{os.getuid()}")}
    return {**cache, **child_environment(command.kind), **command.env, "TMPDIR": str(tmp)}


@contextmanager
def _limited(child: Child, limit: float | None) -> Iterator[threading.Event]:
    """Kills the command and its descendants, and sets the event, if the block takes more than `limit` seconds."""
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        kill(child)

    timer = threading.Timer(limit or 0, end)
    if limit:
        timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()


@contextmanager
def _followed(log: Path, start: int, on_line: Callable[[str], None] | None) -> Iterator[None]:
    """Calls `on_line`, in a thread, with each line that is appended to the log after offset `start`.

    When the block ends, the rest of the log is read before this returns.
    """
    if on_line is None:
        yield
        return
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(log, start, on_line, ended), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join(timeout=5)


def _follow(log: Path, start: int, on_line: Callable[[str], None], ended: threading.Event) -> None:
    """Passes on lines once they are complete; at the end also a last line without a line feed."""
    with open(log, "rb") as file:
        file.seek(start)
        rest = b""
        last = False
        while not last:
            last = ended.wait(FOLLOW_SECONDS)  # before the read, so that the last read gets everything
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in [*lines, rest] if last else lines:
                on_line(line.decode("utf-8", "replace").rstrip("\r"))


def run_job(
    module: str,
    job: Mapping[str, Any],
    *,
    log: Path,
    bar: Bar,
    env: Mapping[str, str],
    kind: Kind = "work",
) -> tuple[dict[str, Any], Finished]:
    """Runs a worker, `python -m module JOB.json`, with a progress bar. `env` is added to its environment.

    "progress" events move the bar and "info" events are printed; all others are merged into the dict returned,
    `worker_main`'s "summary" among them. The job file stays beside the log, so that a worker can be run again by hand.
    Raises what `run` raises.
    """
    write_job(log, job)
    with listening(bar) as (result, receive):
        finished = run(worker_command(module, log, env, kind), log=log, on_event=receive)
    return result, finished


def worker_command(module: str, log: Path, env: Mapping[str, str], kind: Kind = "work") -> Command:
    """The command of a worker whose job file stands beside this log."""
    root = Path(__file__).resolve().parents[2]  # from where `python -m builder...` works in a checkout, too
    return Command([python(), "-m", module, str(job_file(log))], env=env, cwd=root, kind=kind)


@contextmanager
def listening(bar: Bar) -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """Draws a bar while the block runs. Yields a dict of results, and what receives a worker's events (`run_job`)."""
    result: dict[str, Any] = {}
    with bar.out.progress(bar.label, unit=bar.unit) as progress:

        def receive(event: dict[str, Any]) -> None:
            if "progress" in event:
                progress.update(**event["progress"])
            elif "info" in event:
                bar.out.info(event["info"])
            else:
                result.update(event)

        yield result, receive


def write_job(log: Path, job: Mapping[str, Any]) -> None:
    """Writes the job file beside this log."""
    job_file(log).write_text(json.dumps(job, indent=1), encoding="utf-8")


def job_file(log: Path) -> Path:
    """The path of the job file that `run_job` writes beside this log."""
    return log.with_suffix(".json")


def _rebuilt(sent: Mapping[str, str]) -> BuilderError:
    kind: type[BuilderError] = getattr(errors, sent["class"])
    return kind(sent["what"], why=sent["why"], hint=sent["hint"])


def _read_events(fd: int, on_event: Callable[[dict[str, Any]], None]) -> None:
    with os.fdopen(fd, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            on_event(json.loads(line))


def _stop(child: Child) -> None:
    """Sends SIGINT and waits ten seconds. The caller kills what is left."""
    if child.returncode is None:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(10.0)


def write_all(fd: int, data: bytes) -> None:
    """Writes all bytes to a descriptor, bypassing sys.stderr.

    For threads that may still run when the interpreter exits: it aborts if one of them holds the lock of sys.stderr.
    """
    while data:
        data = data[os.write(fd, data) :]


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log without blank ones, for an error message; "" if there is no log."""
    try:
        text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(line for line in text.splitlines()[-lines:] if line.strip())


def _failure(argv: Sequence[str], code: int, log: Path) -> Failed:
    memory = "SIGKILL usually means that the machine ran out of memory (check `dmesg`). "
    killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    what = f"{Path(argv[0]).name} {exit_status.describe(code)}."
    return Failed(what, log=log, code=code, hint=memory if killed else "")


def python() -> str:
    """The Python interpreter to start workers with: the one that runs now."""
    return sys.executable
