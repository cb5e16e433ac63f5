"""The tuned recipe as a file for `builder build --recipe`: what the user named, and the settings of the best trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from builder.core.store import replace_file
from builder.recipe.schema import Resolved
from builder.recommend.recipe_file import part_of
from builder.recommend.request import named
from builder.tune.search import Trial
from builder.tune.space import flags


def values(best: Trial, user: Resolved) -> dict[str, Any]:
    """The recipe as a tree: the user's values, GPU and target, and those that the search varied."""
    changed = user.changed(flags(best.settings))
    wanted = {*named(user), *flags(best.settings), "gpu", "target"}
    return part_of(changed.recipe, wanted)


def write(best: Trial, first: Trial, user: Resolved, path: Path) -> None:
    """Writes the recipe, replacing an earlier file. `first`: the trial with the user's own settings."""
    assert best.measurement is not None
    objective = best.measurement.objective
    unit = f"requests/s within {objective}" if objective else "output tokens/s"
    lines = [
        f"# By `builder tune` with AIPerf {best.measurement.version}: {best.value or 0:.3f} {unit};",
        f"# the recipe before: {first.value or 0:.3f}.",
        yaml.safe_dump(values(best, user), sort_keys=False, allow_unicode=True),
    ]
    replace_file(path, "\n".join(lines))
