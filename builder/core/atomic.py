"""Atomic file system changes: a process killed at any moment leaves either the old state or the new one."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from builder.core import interrupts
from builder.core.errors import BuilderError, StageError, UsageError
from builder.core.output import size

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# renameat2(2) fails with one of these where RENAME_EXCHANGE is missing: on NFS, some FUSE file systems, Linux < 3.15.
_EXCHANGE_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
_libc = ctypes.CDLL(None, use_errno=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: readers see the old content or the new one. BuilderError if the disk refuses."""
    make_directory(path.parent)
    temporary = _temporary(path)
    try:
        data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        temporary.write_bytes(data)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_link(link: Path, target: str) -> None:
    """Points a symbolic link at `target` atomically. BuilderError if the disk refuses."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    make_directory(link.parent)
    temporary = _temporary(link)
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)
        fsync(link.parent)
    except OSError as error:
        raise disk_error(error, link.parent) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A temporary name in the same directory. Removes the temporary files that killed processes left for this path."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = stale.name.split(".")[-2]
        if not (pid.isdigit() and Path("/proc", pid).exists()):
            with suppress(OSError):
                stale.unlink()
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


def replace_directory(new: Path, final: Path) -> None:
    """Renames the directory `new` to `final` and then removes the directory that had that name.

    Where the file system supports it, the two names are exchanged in one step. Elsewhere the old directory is first
    renamed to `backup_path(final)`; after a kill between the two renames, `restore_backup` renames it back.
    """
    old = backup_path(final)
    if not os.path.lexists(final):
        new.rename(final)
    elif _exchange(new, final):
        old = new
    else:
        with interrupts.deferred():
            final.rename(old)
            new.rename(final)
    fsync(final.parent)
    remove(old)


def backup_path(final: Path) -> Path:
    """Where `replace_directory` keeps the old directory between its two renames."""
    return final.parent / f".{final.name}.old"


def restore_backup(final: Path) -> None:
    """Completes a `replace_directory` that was killed between its two renames: the old directory is back."""
    if not os.path.lexists(final) and backup_path(final).is_dir():
        backup_path(final).rename(final)


def remove(path: Path) -> None:
    """Removes a file, a link or a directory tree. Keeps a directory that contains a mount point."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir() and not mounts_under(path):
        shutil.rmtree(path)


def mounts_under(path: Path) -> list[Path]:
    """Mount points at or below a path, including bind mounts, which stat() can't tell from other directories."""
    start = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return [path] if os.path.ismount(path) else []
    # The fifth field is the mount point; space, tab, newline and backslash are octal escapes (proc_pid_mountinfo(5)).
    points = (re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines)
    return [Path(point) for point in points if point == start or point.startswith(start.rstrip("/") + "/")]


def fsync(path: Path) -> None:
    """Flushes a file's or a directory's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Creates a directory and its parents. BuilderError if the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> BuilderError:
    """Translates an OSError under `path` into a message with a fix: disk full, not writable, or anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(
            f"The disk that holds {path} is full ({_free(_existing(path))}).",
            why="The unfinished output was removed.",
            hint="Free some space (`builder clean --older-than 7d` removes old builds that no link needs), or choose "
            "another --output.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UsageError(
            f"Can't write to {path}.",
            why=str(error),
            hint="Choose a writable --output, or change its owner: chown -R $(id -u):$(id -g) DIRECTORY",
        )
    return StageError(f"A file operation in {path} failed: {error}.")


def _free(path: Path) -> str:
    """What ran out: bytes, or inodes (which only `df -i` shows)."""
    found = os.statvfs(path)
    if found.f_files and not found.f_favail:
        return "no free inodes: too many files"
    return f"{size(found.f_bavail * found.f_frsize)} free"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step. False if the file system or the C library does not support it."""
    if not hasattr(_libc, "renameat2"):  # glibc before 2.28
        return False
    if _libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _EXCHANGE_UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))
