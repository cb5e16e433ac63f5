"""Environments of AIPerf that were made for other versions of it, or by other Pythons, and are no longer used.

They are in the user's cache, which several output directories and Pythons share. So only age says that one is unused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from builder.aiperf.environment import cache, place
from builder.clean.leftovers import DAY, Entry, bytes_of, children, duration

YOUNG = 30 * DAY


def find(older_than: float | None) -> Iterator[Entry]:
    """Yields those to remove. `older_than`: seconds, instead of 30 days; what was used within a day always stays."""
    young = YOUNG if older_than is None else max(older_than, DAY)
    current = place()
    for path in children(cache()):
        if not path.name.startswith("aiperf-") or path == current or path.is_symlink() or not path.is_dir():
            continue
        unused = time.time() - path.stat().st_mtime
        if unused >= young:
            yield Entry(path, f"AIPerf's environment of another version, unused for {duration(unused)}", bytes_of(path))
