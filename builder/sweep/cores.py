"""Cores of this machine for one step: by affinity, which thread pools follow.

A variable that limits threads is part of the store's keys, so with one another build would not find what was made.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from builder.core import temporary
from builder.core.locks import flock, lock_file


@contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """What is started in the block runs on these cores alone."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def taken(count: int) -> Iterator[set[int]]:
    """Cores that no other process of this user has taken so, while the block runs: `count` of them, or as many as are
    free; without any free one all."""
    place = temporary.base() / f"trtllm-builder-cores-{os.getuid()}"
    found = set[int]()
    with ExitStack() as held:
        if not _is_ours(place):
            yield os.sched_getaffinity(0)
            return
        for core in sorted(os.sched_getaffinity(0)):
            if len(found) == count:
                break
            with ExitStack() as tried:
                handle = tried.enter_context(lock_file(place / str(core)))
                if flock(handle, fcntl.LOCK_EX, wait=False):  # the kernel frees it when we die
                    found.add(core)
                    held.enter_context(tried.pop_all())
        yield found or os.sched_getaffinity(0)


def _is_ours(place: Path) -> bool:
    """Makes the directory. False if it can't be made or is another user's, who could have put links into it."""
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
