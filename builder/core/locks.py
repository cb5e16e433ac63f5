"""File locks: of a store, of an artifact while it is built, and of a repository while it is served.

The kernel releases a lock when its process dies, so a killed process does not block others.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from builder.core.atomic import disk_error, make_directory
from builder.core.errors import UsageError


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Opens, and creates if needed, a file to lock; yields its descriptor. BuilderError if the disk refuses."""
    make_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def flock(descriptor: int, how: int, *, wait: bool = True) -> bool:
    """flock(2) with LOCK_SH or LOCK_EX. False if the lock is taken and `wait` is false."""
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def serving_lock(directory: Path) -> Iterator[None]:
    """Locks a repository while it is served, so that `builder clean` does not remove it.

    The lock is on the directory itself, not on a file in it: that also works in a read-only store, and a container
    that mounts the directory shares the lock. UsageError if the directory was replaced before it was locked.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # file systems such as NFS can't lock directories
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not directory.is_dir() or directory.stat().st_ino != os.fstat(descriptor).st_ino:
            raise UsageError(f"{directory} was just removed or rebuilt.", hint="Run the same command again.")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_unless_served(directory: Path) -> Iterator[bool]:
    """Yields whether the repository is not being served; while the block runs, no server can start on it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError:
        yield True
    else:
        yield True
    finally:
        os.close(descriptor)
