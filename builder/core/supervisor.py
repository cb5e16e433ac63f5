"""Runs one command and leaves no process of it behind: python -I -S supervisor.py SHM DIRECTORY COMMAND...

It is the parent of every command that the builder starts. Its stdin is a pipe whose other end only the builder holds;
the kernel closes that end when the builder exits or is killed. It is also a subreaper (prctl(2),
PR_SET_CHILD_SUBREAPER): orphaned descendants of the command become its children, even those that forked twice or
started a session of their own.

When the command exits or the pipe closes, it kills all descendants and removes the shared memory whose names begin
with SHM. If the builder is gone, it also removes DIRECTORY. (Either argument may be empty.) Then it exits with the
command's exit code, or by the command's signal. It is started as a file, without the site module, and imports few
modules, so that it starts fast.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

KILL = b"k"  # the byte that the builder writes into the pipe to have all descendants killed
MARK = "BUILDER_TREE"  # an environment variable of every process that belongs to one command, with the tree's name
SHM = "/dev/shm"
LOCK = "lock"  # the file in a temporary directory that its process holds locked
GIVE_UP_SECONDS = 30.0  # a process in an uninterruptible system call dies only when that call returns
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_libc = ctypes.CDLL(None)


def main(argv: list[str]) -> int:
    """Supervises the command. Returns the exit code, or raises the signal that killed the command."""
    shm, directory, command = argv[1], argv[2], argv[3:]
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Python writes the number of each signal into this pipe, so that one poll() waits for signals and for stdin.
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_read, False)
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_FORWARDED):
        signal.signal(number, lambda *_: None)  # a handler is needed for the write to happen; it has nothing to do
    os.set_blocking(0, False)
    child = _start(command)
    status = _kill_all(child, _watch(child, wakeup_read))
    clean_up(shm, directory if _builder_is_gone() else "")
    return _end_as(status)


def _start(command: list[str]) -> int:
    """Starts the command in its own session, so that signals to its process group don't reach us. Returns its pid."""
    us = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != us:  # the supervisor died before prctl took effect
            os._exit(1)
        os.setsid()
        # Python ignores SIGPIPE and SIGXFSZ at start, and ignored signals stay ignored across exec.
        for number in (*_FORWARDED, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(2, f"Can't start {command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _watch(child: int, wakeup: int) -> int | None:
    """Forwards signals until the command exits, or the builder exits or asks to kill it.

    Returns the command's wait status, None if it still runs.
    """
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(wakeup, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wakeup in ready:
            received = os.read(wakeup, 4096)
            for number in _FORWARDED:
                if number in received:
                    _forward(number, child)
            status = _reap(child)
            if status is not None:
                return status
        if 0 in ready:
            return None


def _builder_is_gone() -> bool:
    """Whether the pipe was closed without KILL, which a living builder writes before it closes the pipe."""
    try:
        return os.read(0, 1) != KILL
    except BlockingIOError:
        return False


def _reap(child: int) -> int | None:
    """Reaps all children that have exited, including orphans. Returns the command's wait status if it was one."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def _kill_all(child: int, status: int | None) -> int:
    """Kills all descendants until none is left: orphans of killed processes become our children in the next round.

    Returns the command's wait status.
    """
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < deadline:
        ended = _reap(child)
        status = ended if ended is not None else status
        found = list(descendants(os.getpid()))
        if not found:
            break
        for pid in found:
            _kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return signal.SIGKILL if status is None else status


def descendants(root: int) -> Iterator[int]:
    """The process ids of all descendants of a process."""
    children: dict[int, list[int]] = {}
    for pid, _, _, parent in processes():
        children.setdefault(parent, []).append(pid)
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        yield from below
        queue += below


def processes() -> Iterator[tuple[int, str, str, int]]:
    """(pid, program name, state, parent's pid) of each process; states as in proc_pid_stat(5)."""
    for pid in _ids():
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().rpartition(")")
            state, parent = rest.split()[:2]
        except (OSError, ValueError):
            continue  # it has just exited
        yield pid, name.partition("(")[2], state, int(parent)


def kill_marked(tree: str) -> None:
    """Kills every process of a tree whose supervisor was killed, recognized by MARK in its environment."""
    mark = f"{MARK}={tree}".encode()
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while found := [pid for pid in _ids() if mark in _environment(pid)]:
        for pid in found:
            _kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)


def _environment(pid: int) -> list[bytes]:
    """The environment of a process as NAME=VALUE; empty for zombies and for other users' processes."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _forward(number: int, child: int) -> None:
    """Sends SIGINT to the command's process group, as a terminal does, and other signals to the command alone."""
    if number == signal.SIGINT:
        try:
            os.killpg(child, number)
            return
        except ProcessLookupError:
            pass  # between fork() and setsid() it has no process group of its own
    _kill(child, number)


def _kill(pid: int, number: int) -> None:
    try:  # noqa: SIM105 - importing contextlib takes longer than importing this file
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def clean_up(shm: str, directory: str = "") -> None:
    """Removes the shared memory whose names begin with `shm`, and the directory. Empty strings are skipped.

    A lock goes last: by that file a sweep knows a removal that was cut short (serving/shared_memory.py).
    """
    names = os.listdir(SHM) if shm and os.path.isdir(SHM) else []
    for name in sorted(names, key=lambda name: name.endswith("lock")):
        if name.startswith(shm):
            try:  # noqa: SIM105
                os.unlink(f"{SHM}/{name}")
            except OSError:
                pass
    if directory:
        remove_directory(directory)


def remove_directory(directory: str) -> None:
    """Removes a temporary directory, LOCK in it last: by that file a sweep knows one whose removal was cut short.

    What can't be removed stays, with LOCK (core/temporary.py).
    """
    import shutil

    try:
        for entry in os.scandir(directory):
            if entry.name == LOCK:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
        if os.listdir(directory) == [LOCK]:
            os.unlink(f"{directory}/{LOCK}")
        os.rmdir(directory)
    except OSError:
        pass


def _end_as(status: int) -> int:
    """Returns the command's exit code, or kills this process with the command's signal, without a core dump."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    import resource

    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # if a core dump is wanted, the command has written its own
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


if __name__ == "__main__":
    os._exit(main(sys.argv))
