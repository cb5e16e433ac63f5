"""Temporary directories that no killed process leaves for good: each is locked while its process lives.

The kernel releases the lock (flock(2)) when the process dies, however it dies; the next command that needs a temporary
directory removes those whose lock is free. So no age and no process number has to be trusted, which would mean nothing
in another container that shares the directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import interrupts
from builder.core.errors import StageError
from builder.core.locks import flock, is_at
from builder.core.supervisor import LOCK, remove_directory

PREFIX = "trtllm-builder-"
FAILED = "failed"  # marks a directory that holds nothing but the log of a failure, which a message refers to
KEPT_LOGS = 5  # the newest of these that are kept
_NAME = re.compile(PREFIX + "[a-z0-9_]{8}")  # as mkdtemp names them


@dataclass(frozen=True)
class LockedDirectory:
    """A directory of this process, and the descriptor that holds its lock."""

    path: Path
    lock: int

    def contents(self) -> list[Path]:
        """What its process put into it: all but the file that is locked."""
        return [path for path in self.path.iterdir() if path.name != LOCK]

    def remove(self) -> None:
        """Removes it whole: an interrupt waits until the end."""
        with interrupts.deferred():
            remove_directory(str(self.path))
            self.release()

    def release(self) -> None:
        """Releases the lock, so that the next command may remove the directory."""
        os.close(self.lock)


@contextmanager
def directory() -> Iterator[Path]:
    """A new directory in the first of `bases` that takes one, removed when the block ends. StageError if none does."""
    made = None
    try:
        with interrupts.deferred():
            made = _create_somewhere()
        yield made.path
    finally:
        if made:
            made.remove()


def bases() -> list[Path]:
    """Where temporary files may be: the directories of `tempfile.gettempdir`.

    That function itself creates a file in each to find out, and an interrupt or a kill at that moment leaves the file.
    """
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    return [Path(base).absolute() for base in dict.fromkeys([*named, "/tmp", "/var/tmp"]) if base]


def base() -> Path:
    """The first of `bases` that is a directory and may be written to; without one the last."""
    return next((base for base in bases() if base.is_dir() and os.access(base, os.W_OK | os.X_OK)), bases()[-1])


def settle() -> None:
    """Names `base` to `tempfile`, for libraries that call its `gettempdir`: dill does when it is imported."""
    if tempfile.tempdir is None:
        tempfile.tempdir = str(base())


def outside(path: Path) -> Path:
    """`path`; if it lies in a temporary directory of ours, the directory that holds that one."""
    return next((parent.parent for parent in (path, *path.parents) if _NAME.fullmatch(parent.name)), path)


def _create_somewhere() -> LockedDirectory:
    refused = []
    for place in bases():
        try:
            sweep(place)
            return create(place)
        except OSError as error:
            refused.append(f"{place}: {error.strerror}")
    raise StageError(
        "There is no directory for temporary files.",
        why="\n".join(refused),
        hint="Free some space, or choose another directory: TMPDIR=DIR",
    )


def create(place: Path) -> LockedDirectory:
    """A new, locked directory in `place`. OSError if the disk refuses. Call it with interrupts deferred."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        try:
            lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another process's sweep took it for one that a killed process left empty
            continue
        except OSError:
            remove_directory(str(path))
            raise
        with suppress(OSError):  # a file system without locks: no sweep can lock it, so none removes it
            flock(lock, fcntl.LOCK_EX)
        if is_at(lock, path / LOCK):  # else a sweep was faster
            return LockedDirectory(path, lock)
        os.close(lock)


def sweep(place: Path) -> None:
    """Removes the directories that killed processes left in `place`, and all but the newest logs of failures."""
    logs = []
    for path in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = path.lstat()
            private = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o777 == 0o700 and found.st_uid == os.getuid()
            if not private or not _NAME.fullmatch(path.name):
                continue
            if (path / FAILED).exists():
                logs.append((found.st_mtime, path))
            else:
                _remove_unlocked(path)
    for _, path in sorted(logs)[:-KEPT_LOGS]:
        with suppress(OSError):
            _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    """Removes a directory unless its lock is taken. OSError where it stays.

    The process that is just creating it notices (`create`): it can't open or no longer finds the file that it locks.
    """
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        path.rmdir()  # its process was killed before it created the lock; with anything in it, it is not ours
        return
    try:
        if flock(lock, fcntl.LOCK_EX, wait=False):
            remove_directory(str(path))
    finally:
        os.close(lock)
