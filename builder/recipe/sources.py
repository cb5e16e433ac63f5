"""Where settings come from: presets, recipe files, --set and flags, merged by precedence.

A source is a tree, {"engine": {"max_batch_size": 8}}, as YAML holds it. A dotted key names a value in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from builder.core import paths
from builder.core.errors import UsageError
from builder.core.untrusted_text import LARGEST_YAML, parse_yaml, read_regular

EXAMPLES = "Examples are in configs/recipes/."


def presets() -> list[str]:
    """The names of the presets in configs/presets."""
    return sorted(path.stem for path in paths.data("configs", "presets").glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """A preset of configs/presets by name. UsageError for one that does not exist."""
    if name not in presets():
        raise UsageError(f"There is no preset {name!r}.", hint=f"Presets: {', '.join(presets())}.")
    return load_yaml(paths.data("configs", "presets", f"{name}.yaml"))


def load_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. UsageError if it can't be read or holds something else."""
    try:
        loaded = parse_yaml(read_regular(file, LARGEST_YAML, pipe=True))
    except OSError as error:
        raise UsageError(f"Can't read the recipe {file}.", why=str(error)) from error
    except ValueError as error:
        raise UsageError(f"The recipe {file} is not valid YAML.", why=str(error), hint=EXAMPLES) from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UsageError(f"The recipe {file} is not a mapping of keys to values.", hint=EXAMPLES)
    return loaded


def parse_set(text: str) -> dict[str, Any]:
    """`engine.max_batch_size=8` -> {"engine": {"max_batch_size": 8}}. The value is parsed as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)*", key):
        raise UsageError(f"--set {text!r} is not of the form a.b=value.", hint="--set engine.max_batch_size=8")
    try:
        return nest(key, parse_yaml(value))
    except ValueError as error:
        raise UsageError(f"The value of --set {text!r} is not valid YAML.", why=str(error)) from error


def nest(key: str, value: Any) -> dict[str, Any]:
    """A tree with one value: ("a.b", 1) -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    _put(tree, key, value)
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merge(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merges (name, tree) sources; a later one overrides an earlier one, value by value.

    Returns the merged tree, and for each dotted key the name of the source that set it.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for key, value in flatten(layer).items():
            _put(merged, key, value)
            origins[key] = origin
    return merged, origins


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UsageError(f"{parent!r} in {key!r} is a value, so no key can be below it.")
        tree = below
    tree[last] = value
