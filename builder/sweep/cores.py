"""Cores of this machine for one step: by affinity, which thread pools follow.

A variable that limits threads is part of the store's keys, so with one another build would not find what was made.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from builder.core import temporary
from builder.core.atomic import make_directory
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
    make_directory(place)
    found = set[int]()
    with ExitStack() as held:
        for core in sorted(os.sched_getaffinity(0)):
            if len(found) == count:
                break
            with ExitStack() as tried:
                handle = tried.enter_context(lock_file(place / str(core)))
                if flock(handle, fcntl.LOCK_EX, wait=False):  # the kernel frees it when we die
                    found.add(core)
                    held.enter_context(tried.pop_all())
        yield found or os.sched_getaffinity(0)
