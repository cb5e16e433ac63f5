"""Child processes: memory comes back, the log is its own file, the exit code is read, and none outlives its parent.

Each child runs below a supervisor (supervisor.py), whose process id and exit code stand for the child's.
"""

from __future__ import annotations

import errno
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from builder.core import errors, exit_status, interrupts, supervisor
from builder.core.environment import Kind, child_environment
from builder.core.errors import BuilderError, StageError

if TYPE_CHECKING:
    from builder.core.output import Output

PROGRESS_FD = "BUILDER_PROGRESS_FD"
FOLLOW_SECONDS = 0.2  # between two looks at a child's log
SUPERVISOR_SECONDS = 40.0  # for a supervisor to kill its tree; it gives up itself after 30
Child: TypeAlias = "subprocess.Popen[bytes]"


@dataclass(frozen=True)
class Finished:
    """A child that ended with 0: its wall time and its largest resident set in bytes."""

    seconds: float
    max_rss: int


class Failed(StageError):
    """A child that did not end with 0: its exit code, minus the signal's number, or None where it took too long."""

    def __init__(self, what: str, *, log: Path, code: int | None = None, hint: str = "") -> None:
        super().__init__(what, why=tail(log), hint=f"{hint}The whole log: {log}")
        self.code = code


@contextmanager
def supervised(
    argv: Sequence[str],
    *,
    stop: Callable[[Child], None],
    log: IO[bytes],
    env: Mapping[str, str],
    shm: str = "",
    directory: Path | None = None,
    **popen: Any,
) -> Iterator[Child]:
    """A process in a session of its own, which `stop` asks to end when the block is left, however it is left.

    Then every process that it started is killed, and the shared memory whose names begin with `shm` is removed. The
    same happens when we are killed, and then the directory, otherwise the caller's to remove, goes too.
    FileNotFoundError if there is no such program.
    """
    if shutil.which(argv[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(f"There is no program {argv[0]}.")
    tree = f"{os.getpid()}-{secrets.token_hex(8)}"
    removed = str(directory) if directory else ""
    child: Child | None = None
    try:
        # What a handler raises inside Popen would leave us without the process that it has just started.
        with interrupts.deferred():
            child = subprocess.Popen(
                [python(), "-I", "-S", supervisor.__file__, shm, removed, *argv],
                stdin=subprocess.PIPE,  # see `kill`; closed when we end
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the child through `stop` alone: one signal, in one order.
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
                supervisor.clean_up(shm)


def kill(child: Child) -> None:
    """Tells the supervisor to kill the whole tree, and does not wait for it."""
    if child.stdin and not child.stdin.closed:
        with suppress(OSError):  # it has ended already
            os.write(child.stdin.fileno(), supervisor.KILL)
        child.stdin.close()


def _end(child: Child, tree: str) -> None:
    """Until nothing is left of the tree, also where its supervisor was killed."""
    kill(child)
    if child.returncode is None:
        try:
            child.wait(SUPERVISOR_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.returncode < 0:  # as its command did, or in its place
        supervisor.kill_marked(tree)


def run(
    argv: Sequence[str],
    *,
    log: Path,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    limit: float | None = None,
    kind: Kind = "work",
) -> Finished:
    """Runs `argv` with its stdout and stderr in `log`; events that the child `emit`s go to `on_event`.

    Of our environment the child gets what its kind may have, and `env`.

    `on_line` hears each line of the log while the child runs, all of them before this returns or raises.
    When it ends with anything but 0, raises the error that the child `emit_error`ed, or Failed with the log's last
    lines. On an interrupt the child gets SIGINT, ten seconds to end, then SIGKILL; after `limit` seconds SIGKILL.
    """
    read_fd, write_fd = os.pipe()
    start = time.monotonic()
    told: list[dict[str, str]] = []

    def hear(event: dict[str, Any]) -> None:
        if "error" in event:
            told.append(event["error"])
        else:
            on_event(event)

    reader = threading.Thread(target=_read_events, args=(read_fd, hear), daemon=True)
    reader.start()
    environment = {**child_environment(kind), **(env or {}), PROGRESS_FD: str(write_fd)}
    with open(log, "ab") as sink, os.fdopen(write_fd, "wb") as ours:
        sink.write(f"$ {shlex.join(argv)}\n".encode())
        sink.flush()
        with (
            _followed(log, sink.tell(), on_line),
            supervised(argv, stop=_stop, log=sink, env=environment, cwd=cwd, pass_fds=[write_fd]) as child,
        ):
            ours.close()  # so that the reader ends with the child
            with _limited(child, limit) as overdue:
                _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
    reader.join(timeout=5)
    if overdue.is_set():
        raise Failed(f"{Path(argv[0]).name} took more than {limit:.0f} s and was stopped.", log=log)
    if child.returncode != 0:
        raise _told(told[-1]) if told else _failure(argv, child.returncode, log)
    return Finished(time.monotonic() - start, usage.ru_maxrss * 1024)


@contextmanager
def _limited(child: Child, limit: float | None) -> Iterator[threading.Event]:
    """After `limit` seconds in the block the child and its own children are killed, and the event is set."""
    overdue = threading.Event()

    def end() -> None:
        overdue.set()
        kill(child)

    timer = threading.Timer(limit or 0, end)
    if limit:
        timer.start()
    try:
        yield overdue
    finally:
        timer.cancel()


@contextmanager
def _followed(log: Path, start: int, on_line: Callable[[str], None] | None) -> Iterator[None]:
    """While the block runs, a thread reads what is added to the file after `start`; at its end, what is left of it."""
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
    """Whole lines, as they are completed; the last one also without its end."""
    with open(log, "rb") as file:
        file.seek(start)
        rest = b""
        last = False
        while not last:
            last = ended.wait(FOLLOW_SECONDS)  # before the read: what was written until then is read below
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in [*lines, rest] if last else lines:
                on_line(line.decode("utf-8", "replace").rstrip("\r"))


def run_job(
    module: str,
    job: Mapping[str, Any],
    *,
    log: Path,
    out: Output,
    label: str,
    unit: str = "",
    env: Mapping[str, str],
    kind: Kind = "work",
) -> tuple[dict[str, Any], Finished]:
    """Runs `python -m module JOB.json`, with a progress bar that begins as `label`; returns what the child told, too.

    Of its events "progress" moves the bar and "info" is shown; all others are what it told. The job file stays beside
    the log, so that anyone can run it again. Raises as `run` does.
    """
    told: dict[str, Any] = {}
    job_file(log).write_text(json.dumps(job, indent=1), encoding="utf-8")
    with out.progress(label, unit=unit) as bar:

        def hear(event: dict[str, Any]) -> None:
            if "progress" in event:
                bar.update(**event["progress"])
            elif "info" in event:
                out.info(event["info"])
            else:
                told.update(event)

        argv = [python(), "-m", module, str(job_file(log))]
        finished = run(argv, log=log, on_event=hear, env=env, kind=kind, cwd=Path(__file__).resolve().parents[2])
    return told, finished


def job_file(log: Path) -> Path:
    """Where `run_job` writes what the child of this log is asked."""
    return log.with_suffix(".json")


def worker_main(
    argv: Sequence[str],
    work: Callable[[dict[str, Any]], dict[str, Any] | None],
    known: Callable[[BaseException, dict[str, Any]], BuilderError | None] = lambda error, job: None,
) -> int:
    """In a child that `run_job` started: reads its job file and does the work, whose result it tells as `summary`.

    What people can do something about, a BuilderError or what `known` makes one of, the parent learns by an event, and
    the exit code is the error's. Anything else is a fault of ours, and its traceback belongs in the log.
    """
    job = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    try:
        summary = work(job)
    except BaseException as error:
        told = error if isinstance(error, BuilderError) else known(error, job)
        if told is None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            from builder.core.store import disk_error

            told = disk_error(error, Path(str(error.filename or ".")))
        if told is None:
            raise
        emit_error(told)
        return told.exit_code
    if summary is not None:
        emit(summary=summary)
    return 0


def emit(**event: Any) -> None:
    """In a child: one event for the parent. Without a parent that listens it does nothing."""
    fd = os.environ.get(PROGRESS_FD)
    if fd:
        os.write(int(fd), (json.dumps(event) + "\n").encode())


def emit_error(error: BuilderError) -> None:
    """In a child, before it ends: `run` raises this error in the parent, so that message and exit code are its own."""
    emit(error={"class": type(error).__name__, "what": error.what, "why": error.why, "hint": error.hint})


def _told(told: Mapping[str, str]) -> BuilderError:
    kind: type[BuilderError] = getattr(errors, told["class"])
    return kind(told["what"], why=told["why"], hint=told["hint"])


def _read_events(fd: int, on_event: Callable[[dict[str, Any]], None]) -> None:
    with os.fdopen(fd, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            on_event(json.loads(line))


def _stop(child: Child) -> None:
    """SIGINT, and ten seconds to end; what is left then is killed by the caller."""
    if child.returncode is None:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(10.0)


def write_all(fd: int, data: bytes) -> None:
    """For threads that may be running when the interpreter ends: it aborts where one holds the lock of sys.stderr."""
    while data:
        data = data[os.write(fd, data) :]


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for a message."""
    try:
        text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(line for line in text.splitlines()[-lines:] if line.strip())


def _failure(argv: Sequence[str], code: int, log: Path) -> Failed:
    memory = "SIGKILL usually means that the machine ran out of memory (`dmesg` tells). "
    killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    what = f"{Path(argv[0]).name} {exit_status.describe(code)}."
    return Failed(what, log=log, code=code, hint=memory if killed else "")


def python() -> str:
    """The interpreter for our own children: the one that runs now."""
    return sys.executable
