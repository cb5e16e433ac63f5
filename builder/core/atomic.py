"""Changes on the disk that happen whole or not at all, whenever the process is killed."""

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
# The file system (NFS and some FUSE ones) or a kernel before 3.15 can't exchange two names.
_CAN_NOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
_libc = ctypes.CDLL(None, use_errno=True)


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all: readers see the old text or the new one."""
    make_directory(path.parent)
    fresh = _fresh(path)
    try:
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        fsync(fresh)
        fresh.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def replace_link(link: Path, target: str) -> None:
    """Points a symbolic link to `target` in one step."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    make_directory(link.parent)
    fresh = _fresh(link)
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
        fsync(link.parent)
    except OSError as error:
        raise disk_error(error, link.parent) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def _fresh(path: Path) -> Path:
    """A temporary name beside this one, after removing those that killed processes left of it."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = stale.name.split(".")[-2]
        if not (pid.isdigit() and Path("/proc", pid).exists()):
            with suppress(OSError):
                stale.unlink()
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


def replace_directory(new: Path, final: Path) -> None:
    """Gives the directory `new` the name `final`; what had that name is removed afterwards.

    Both names are exchanged in one step where the file system can. Elsewhere the old directory waits under
    `waiting(final)` for an instant, and `restore` brings it back after a kill.
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
    """Where the previous content of `final` is between the two renames of a file system that can't exchange names."""
    return final.parent / f".{final.name}.old"


def restore_backup(final: Path) -> None:
    """Undoes the first of two renames if the second did not follow."""
    if not os.path.lexists(final) and backup_path(final).is_dir():
        backup_path(final).rename(final)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole directory. A directory that something is mounted in stays."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir() and not mounts_under(path):
        shutil.rmtree(path)


def mounts_under(path: Path) -> list[Path]:
    """Mount points at or below a path, bind mounts too, which look like any other directory to stat()."""
    start = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return [path] if os.path.ismount(path) else []
    # The fifth field, with space, tab, newline and backslash as octal escapes (proc_pid_mountinfo(5)).
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
    """Creates a directory and its parents. A BuilderError says why it can't."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> BuilderError:
    """An OSError as a message: a full or read-only disk and another owner are things that a user can fix."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(
            f"The disk that holds {path} is full ({_free(_existing(path))}).",
            why="Nothing half-made was kept.",
            hint="Free some space (`builder clean --older-than 7d` removes old builds that no link needs) or choose "
            "another --output.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UsageError(
            f"Can't write to {path}.",
            why=str(error),
            hint="Choose a writable --output, or change its owner: chown -R $(id -u):$(id -g) DIRECTORY",
        )
    return StageError(f"The operating system refused: {error}.", hint=f"It happened in {path}.")


def _free(path: Path) -> str:
    """What a full file system lacks: bytes, or inodes, which `df -i` shows and `df` does not."""
    found = os.statvfs(path)
    if found.f_files and not found.f_favail:
        return "no inode free: too many files"
    return f"{size(found.f_bavail * found.f_frsize)} free"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the file system can't."""
    if not hasattr(_libc, "renameat2"):  # glibc before 2.28
        return False
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CAN_NOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))
