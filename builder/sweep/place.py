"""Where a sweep's results are: OUTPUT/sweeps/TITLE-MODEL.

Files of one title may name models of one name (two directories, two organizations): the second gets a digest behind its
name, so that no sweep writes into another's results.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

from builder.core.atomic import make_directory
from builder.core.locks import flock, lock_file
from builder.core.manifest import Damaged, read_object
from builder.core.store import Store, digest_of, replace_file
from builder.publish.links import source_of
from builder.sweep.points import Point, slug

DIRECTORY, SWEEP = "sweeps", "sweep.json"


def directory(title: str, points: Sequence[Point], store: Store) -> Path:
    """The directory of these results, which may not exist yet."""
    models = _models(points)
    of = f" {Path(models[0]).name}" if len(models) == 1 else ""
    first = store.root / DIRECTORY / (slug(title + of) or "sweep")
    try:
        whose = read_object(first / SWEEP)["models"]
    except (Damaged, KeyError):
        return first
    return first if whose == models else first.with_name(f"{first.name}-{digest_of(models)[:8]}")


def claim(title: str, points: Sequence[Point], store: Store) -> Path:
    """Makes this directory, and notes in it whose results it has."""
    with lock_file(store.root / "locks" / "sweeps.lock") as handle:
        flock(handle, fcntl.LOCK_EX)
        place = directory(title, points, store)
        make_directory(place)
        replace_file(place / SWEEP, json.dumps({"title": title, "models": _models(points)}, indent=1))
    return place


def _models(points: Sequence[Point]) -> list[str]:
    return sorted({source_of(point.recipe.model) for point in points})
