"""A recommended recipe as a file for `builder build --recipe`: what the user named, and what the search chose."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import yaml

from builder.core.output import size
from builder.core.store import replace_file
from builder.recipe.schema import Recipe, Resolved
from builder.recipe.sources import flatten, merge, nest
from builder.recommend.request import named
from builder.recommend.trials import Trial

# Keys of the search alone: a build has its quality check, or the gate that its user names.
OF_SEARCH = ("evaluation.", "sensitivity.", "tasks.")


def write(trial: Trial, user: Resolved, path: Path) -> None:
    """Writes the winner's recipe, replacing an earlier file. user: the recipe as the user gave it."""
    kl = "" if trial.candidate.exact else f" KL to BF16 {trial.figures['kl']}."
    lines = [
        f"# Recommended by `builder recommend`: {trial.label}.{kl}",
        f"# {size(trial.candidate.nbytes)} with the KV cache of one full sequence.",
        yaml.safe_dump(values(trial, user), sort_keys=False, allow_unicode=True),
    ]
    replace_file(path, "\n".join(lines))


def values(trial: Trial, user: Resolved) -> dict[str, Any]:
    """The recipe as a tree: the user's values, GPU and target, and those that the search varied."""
    settings = trial.candidate.settings.flags(user.recipe)
    chosen = {key for key, value in settings.items() if value not in ((), "none")}
    wanted = {key for key in named(user) if not key.startswith(OF_SEARCH)} - {*settings} | chosen | {"gpu", "target"}
    return part_of(trial.candidate.resolved.recipe, wanted)


def part_of(recipe: Recipe, wanted: Set[str]) -> dict[str, Any]:
    """These keys of the recipe, or what is below them, as a tree."""
    flat = flatten(json.loads(recipe.model_dump_json()))
    kept = {key: value for key, value in flat.items() if any(f"{key}.".startswith(f"{one}.") for one in wanted)}
    tree, _ = merge(("", nest(key, value)) for key, value in kept.items())
    return tree
