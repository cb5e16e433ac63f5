"""Runs one command, and leaves no process of it: python -I -S supervisor.py SHM DIRECTORY COMMAND...

It is the parent of every child that the builder starts. Its stdin is a pipe that only the builder holds: the kernel
closes it when the builder ends, however it ends. It is also a subreaper (prctl(2), PR_SET_CHILD_SUBREAPER): whatever
the command leaves behind becomes its child, also what forked twice or made a session of its own.

When the command ends or the pipe closes, it kills all of them and removes the shared memory whose names begin with SHM
(and DIRECTORY, if the builder is gone and can't; either may be empty). Then it ends as the command did. It runs as a
file, without the site module: only the standard library, and few modules of it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

KILL = b"k"  # what the builder writes into the pipe to have the tree killed
MARK = "BUILDER_TREE"  # a variable in the environment of every process of a tree, with the tree's name
SHM = "/dev/shm"
GIVE_UP_SECONDS = 30.0  # a process in an uninterruptible system call does not die before that call returns
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_libc = ctypes.CDLL(None)


def main(argv: list[str]) -> int:
    """Supervises the command; the exit code, unless it ends by the signal that ended the command."""
    shm, directory, command = argv[1], argv[2], argv[3:]
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    awake, wakes = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_FORWARDED):
        signal.signal(number, lambda *_: None)  # only the wake-up matters
    os.set_blocking(0, False)
    child = _start(command)
    status = _kill_all(child, _watch(child, awake))
    clean_up(shm, directory if _builder_is_gone() else "")
    return _end_as(status)


def _start(command: list[str]) -> int:
    """The command in a session of its own: a signal to its process group must not reach us."""
    us = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != us:  # we died before the line above
            os._exit(1)
        os.setsid()
        # Python ignores the last two at its start, and what is ignored stays so after exec.
        for number in (*_FORWARDED, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(2, f"{command[0]} can't be started: {error}\n".encode())
    finally:
        os._exit(127)


def _watch(child: int, awake: int) -> int | None:
    """Until the command ends (its wait status), or the builder does or says so (None). Passes signals on meanwhile."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(awake, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if awake in ready:
            came = os.read(awake, 4096)
            for number in _FORWARDED:
                if number in came:
                    _forward(number, child)
            status = _reap(child)
            if status is not None:
                return status
        if 0 in ready:
            return None


def _builder_is_gone() -> bool:
    """Whether the pipe was closed without a word: a builder that lives says KILL before it closes it."""
    try:
        return os.read(0, 1) != KILL
    except BlockingIOError:
        return False


def _reap(child: int) -> int | None:
    """Collects whatever has ended, orphans too; the command's wait status if it was among them."""
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
    """Kills all descendants until none is left. A killed one's children become ours, for the next round."""
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
    """The ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for pid, _, _, parent in processes():
        children.setdefault(parent, []).append(pid)
    to_do = [root]
    while to_do:
        below = children.get(to_do.pop(), [])
        yield from below
        to_do += below


def processes() -> Iterator[tuple[int, str, str, int]]:
    """Each process: its id, its program's name, its state (proc(5)), its parent."""
    for pid in _ids():
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().rpartition(")")
            state, parent = rest.split()[:2]
        except (OSError, ValueError):
            continue  # it has just ended
        yield pid, name.partition("(")[2], state, int(parent)


def kill_marked(tree: str) -> None:
    """Kills every process of a tree whose supervisor was killed, by the mark in its environment."""
    mark = f"{MARK}={tree}".encode()
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while found := [pid for pid in _ids() if mark in _environment(pid)]:
        for pid in found:
            _kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)


def _environment(pid: int) -> list[bytes]:
    """Of a process of this user; empty for a zombie's and anybody else's."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _forward(number: int, child: int) -> None:
    """SIGINT to all of the command's group, as a terminal sends it; the others to the command alone."""
    if number == signal.SIGINT:
        try:
            os.killpg(child, number)
            return
        except ProcessLookupError:
            pass  # it has no group of its own yet
    _kill(child, number)


def _kill(pid: int, number: int) -> None:
    try:  # noqa: SIM105 - contextlib takes longer to import than all of this file
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def clean_up(shm: str, directory: str = "") -> None:
    """Removes the shared memory whose names begin with `shm`, and the directory; "" for none."""
    for name in os.listdir(SHM) if shm and os.path.isdir(SHM) else ():
        if name.startswith(shm):
            try:  # noqa: SIM105
                os.unlink(f"{SHM}/{name}")
            except OSError:
                pass
    if directory:
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


def _end_as(status: int) -> int:
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    import resource

    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command may have left its own
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


if __name__ == "__main__":
    os._exit(main(sys.argv))
