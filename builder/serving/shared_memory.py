"""Names in /dev/shm for one server, and the removal of those that killed commands have left.

A file with the same prefix is locked while the command runs. The kernel releases the lock when the command dies,
however it dies, so neither a process number has to be trusted nor an age (as in core/temporary.py): another container
may share /dev/shm and have a process with the same number.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from builder.core import interrupts, supervisor
from builder.core.locks import flock, is_at

SHM = Path(supervisor.SHM)
_LOCK = re.compile(r"(builder-\d+-[0-9a-f]{8}-)lock")


@contextmanager
def prefix() -> Iterator[str]:
    """A prefix for names in /dev/shm that nobody else has. Whoever uses it removes what has such a name."""
    sweep()
    name = f"builder-{os.getpid()}-{secrets.token_hex(4)}-"
    lock = None
    try:
        with interrupts.deferred():
            lock = _locked(SHM / f"{name}lock")
        yield name
    finally:
        with interrupts.deferred():
            supervisor.clean_up(name)
            if lock is not None:
                os.close(lock)


def sweep() -> None:
    """Removes what killed commands have left."""
    for path in SHM.glob("builder-*-lock"):
        named = _LOCK.fullmatch(path.name)
        with suppress(OSError):
            found = path.lstat()
            if named and found.st_uid == os.getuid():
                _remove_unlocked(path, named.group(1))


def _locked(path: Path) -> int | None:
    """The descriptor that holds the lock; None where /dev/shm takes no file, and then Triton's take none either."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        with suppress(OSError):
            flock(lock, fcntl.LOCK_EX)
        if is_at(lock, path):  # else a sweep was faster
            return lock
        os.close(lock)


def _remove_unlocked(path: Path, prefix: str) -> None:
    """Removes all names with this prefix unless the lock is taken. OSError where they stay."""
    lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if flock(lock, fcntl.LOCK_EX, wait=False) and is_at(lock, path):
            supervisor.clean_up(prefix)
    finally:
        os.close(lock)
