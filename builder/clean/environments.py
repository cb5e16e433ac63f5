"""Environments of AIPerf that were made for other versions of it, or by other Pythons, and are no longer used.

They are in the user's cache, which several output directories and Pythons share. So only age says that one is unused,
or that one whose name ends in .tmp is no longer being made or removed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from builder.aiperf.environment import cache, place
from builder.clean.leftovers import DAY, Entry, bytes_of, children, duration

YOUNG = 30 * DAY
NAME = re.compile(r"aiperf-.+|\.aiperf-.+\.tmp")


def find(older_than: float | None) -> Iterator[Entry]:
    """Yields those to remove. `older_than`: seconds, instead of 30 days; what was used within a day always stays."""
    young = YOUNG if older_than is None else max(older_than, DAY)
    current = place()
    for path in children(cache()):
        if not NAME.fullmatch(path.name) or path == current or path.is_symlink() or not path.is_dir():
            continue
        try:
            unused = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # another clean has removed it
            continue
        if unused >= young:
            which = "unfinished" if path.name.startswith(".") else "of another version"
            yield Entry(path, f"AIPerf's environment {which}, unused for {duration(unused)}", bytes_of(path))
