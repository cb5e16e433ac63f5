"""What `builder tune` can vary: which recipe keys, and which values of each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.core.errors import UsageError
from builder.recipe.schema import Recipe
from builder.recipe.target_facts import REFERENCE

Value = int | float
# Name in --search -> recipe key. The kinds of value are those of the key.
KEYS = {
    "max_batch_size": "engine.max_batch_size",
    "max_num_tokens": "engine.max_num_tokens",
    "queue_delay": "repository.max_queue_delay_microseconds",
    "kv_fraction": "repository.kv_cache_free_gpu_mem_fraction",
    "preprocessing_instances": "repository.preprocessing_instances",
    "postprocessing_instances": "repository.postprocessing_instances",
    "bls_instances": "repository.bls_instances",
}
FRACTIONS = ("kv_fraction",)
ON_GPU = ("kv_fraction", "max_num_tokens")  # the reference executor has no pool of KV blocks and no packed batches
TEXT_MODELS = ("preprocessing_instances", "postprocessing_instances", "bls_instances")  # the gateway does their work
EXAMPLE = "--search max_batch_size=16,32,64 --search queue_delay=0,500"


@dataclass(frozen=True)
class Parameter:
    """A recipe key and the values to try, in order."""

    name: str
    values: tuple[Value, ...]

    @property
    def key(self) -> str:
        """Its key in the recipe."""
        return KEYS[self.name]


def space(recipe: Recipe, asked: Sequence[str]) -> tuple[Parameter, ...]:
    """The parameters that --search names (NAME=VALUE,VALUE), or those that matter for this target.

    UsageError for an unknown name, values that are none, and what has no effect on the reference executor.
    """
    found = tuple(_parameter(text) for text in asked) or defaults(recipe)
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--search names {name} twice.", hint=EXAMPLE)
        if name in ON_GPU and recipe.target == REFERENCE.name:
            raise UsageError(
                f"{name} has no effect on the reference executor.",
                why="It keeps every request's cache, and computes one request after the other; only a GPU can show it.",
                hint=f"Omit --search {name}=..., or tune on the GPU that will serve.",
            )
    return found


def defaults(recipe: Recipe) -> tuple[Parameter, ...]:
    """Batch size around the recipe's, queue delay, and on a GPU the share of memory for the KV cache."""
    size = recipe.engine.max_batch_size
    sizes = tuple(sorted({max(1, size // 4), max(1, size // 2), size, 2 * size}))
    found = [Parameter("max_batch_size", sizes), Parameter("queue_delay", (0, 100, 1000, 5000))]
    if recipe.target != REFERENCE.name:
        found.append(Parameter("kv_fraction", (0.8, 0.85, 0.9, 0.95)))
    return tuple(found)


def settings_of(recipe: Recipe, parameters: Sequence[Parameter]) -> dict[str, Value]:
    """The recipe's own values: {name: value}."""
    tree = recipe.model_dump()
    found = {}
    for one in parameters:
        part, key = one.key.split(".")
        found[one.name] = tree[part][key]
    return found


def flags(settings: Mapping[str, Value]) -> dict[str, Value]:
    """These settings as recipe keys."""
    return {KEYS[name]: value for name, value in settings.items()}


def spoken(settings: Mapping[str, Value]) -> str:
    """`max_batch_size 16, queue_delay 0`."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _parameter(text: str) -> Parameter:
    name, equals, listed = text.partition("=")
    if name not in KEYS:
        near = difflib.get_close_matches(name, KEYS, 1)
        raise UsageError(
            f"--search can't vary {name!r}.", why=f"It can vary {', '.join(KEYS)}.",
            hint=f"--search {near[0]}=..." if near else EXAMPLE,
        )  # fmt: skip
    kind = float if name in FRACTIONS else int
    try:
        values = tuple(dict.fromkeys(kind(word) for word in listed.split(",")))
    except ValueError:
        values = ()
    if not equals or not values:
        raise UsageError(f"--search {text}: give the values to try, separated by commas.", hint=EXAMPLE)
    return Parameter(name, values)
