"""Finds leftovers in a store: unfinished directories and files of killed builds, old logs, unused lock files.

Considers only names that this program creates. The caller holds the store's exclusive lock, so no build is running.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builder.core import atomic, temporary
from builder.core.store import EVALUATION, MARKER, STAGES, old_logs

DAY = 86400.0
LOGS_KEPT, LOGS_YOUNG = 50, 7 * DAY  # keep the newest logs, and all that are younger
PARTIAL_YOUNG = 30 * DAY  # keep results of a killed run that long, because the next run resumes from them
# <stage>/.<key>.<pid>.tmp and .trash; in format 1 also .<key>.old.tmp; in checkpoint/ a directory of core/temporary.py
HALF_MADE = re.compile(rf"\.[0-9a-f]{{16}}\.(?:\d+|old)\.(?:tmp|trash)|{temporary.PREFIX}[a-z0-9_]{{8}}")
WAITING = re.compile(r"\.([0-9a-f]{16})\.old")  # atomic.backup_path
HALF_WRITTEN = re.compile(r"\..+\.\d+(?:\.tmp)?")  # a file or link whose writer was killed before the rename
LOCK = re.compile(r"[a-z_]+-[\w.-]+\.lock")
PARTIAL = re.compile(r"([a-z_]+)-([0-9a-f]{16})(?:-\d{4}-\d{4})?\.(?:jsonl|safetensors)")


@dataclass(frozen=True)
class Entry:
    """A path, with the reason why it is removed, kept or left alone, and its size in bytes."""

    path: Path
    why: str
    nbytes: int = 0


def bytes_of(path: Path) -> int:
    """The bytes that removing a path frees at most; hard links elsewhere may keep some in use."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if os.path.lexists(path) else 0
    return sum(bytes_of(child) for child in children(path))


def children(directory: Path) -> list[Path]:
    """The sorted entries of a directory; empty if it can't be read."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def why_untouchable(path: Path) -> str:
    """Why a directory must not be entered or removed: it is a link or a mount point. "" if it may be."""
    if path.is_symlink():
        return "it is a symbolic link"
    if path.exists() and path.resolve() in atomic.mounts_under(path):
        return "something is mounted there"
    return ""


def find_leftovers(root: Path, older_than: float | None) -> Iterator[tuple[str, Entry]]:
    """Yields ("remove", "keep" or "alone", entry) of each leftover. `older_than`: seconds, for all ages above."""
    for stage in (*STAGES, *EVALUATION):
        for path in _inside(root / stage):
            if HALF_MADE.fullmatch(path.name):
                yield _unless_mounted(path, "unfinished or partly removed")
            elif found := WAITING.fullmatch(path.name):
                yield _waiting(path, path.parent / found[1])
    for name in ("models", "builds", "history", "probes", "timing", "reports"):
        for path in _inside(root / name):
            if HALF_WRITTEN.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
                yield _unless_mounted(path, "partly written")
    for path in root.glob(f".{MARKER}.*.tmp"):
        yield _unless_mounted(path, "partly written")
    for path in _inside(root / "partial"):
        if HALF_WRITTEN.fullmatch(path.name) and path.is_file():
            yield _unless_mounted(path, "partly written")
            continue
        yield _partial(path, root, PARTIAL_YOUNG if older_than is None else older_than)
    keep, young = (LOGS_KEPT, LOGS_YOUNG) if older_than is None else (0, older_than)
    for path in [] if why_untouchable(root / "logs") else old_logs(root / "logs", keep=keep, older_than=young):
        yield _unless_mounted(path, "an old log")
    for path in _inside(root / "locks"):
        if LOCK.fullmatch(path.name) and path.is_file() and not path.is_symlink() and _is_free(path):
            yield _unless_mounted(path, "an unused lock")


def duration(length: float) -> str:
    """Seconds in the largest unit that fits, rounded: 270000 -> '3 days'."""
    for unit, worth in (("days", DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if length >= worth:
            return f"{length / worth:.0f} {unit}"
    return f"{length:.0f} s"


def _inside(directory: Path) -> list[Path]:
    return [] if why_untouchable(directory) else children(directory)


def _unless_mounted(path: Path, why: str) -> tuple[str, Entry]:
    if path.is_dir() and not path.is_symlink() and atomic.mounts_under(path):
        return "alone", Entry(path, "something is mounted there")
    return "remove", Entry(path, why, bytes_of(path))


def _waiting(path: Path, final: Path) -> tuple[str, Entry]:
    """A stage whose rebuild was killed between two renames (atomic.replace_directory)."""
    if os.path.lexists(final):
        return _unless_mounted(path, "it was replaced")
    return "keep", Entry(path, "a rebuild of it was interrupted; the next build restores it", bytes_of(path))


def _partial(path: Path, root: Path, young: float) -> tuple[str, Entry]:
    found = PARTIAL.fullmatch(path.name)
    if not found or not path.is_file() or path.is_symlink():
        return "alone", Entry(path, "it was not written by this program")
    unused = max(0.0, time.time() - path.stat().st_mtime)
    if (root / found[1] / found[2]).is_dir() or unused >= young:
        return "remove", Entry(path, f"results of a killed run, unused for {duration(unused)}", bytes_of(path))
    return "keep", Entry(path, "results of a killed run; the next run resumes from them", bytes_of(path))


def _is_free(lock: Path) -> bool:
    """Whether nobody holds this lock. False for the store's own lock, which the caller holds."""
    if lock.name == "store.lock":
        return False
    try:
        with open(lock, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
