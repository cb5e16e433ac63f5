"""What `builder tune` can vary: which recipe keys, and which values of each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.core.errors import UsageError
from builder.llmapi import versions as llmapi_versions
from builder.recipe.schema import Recipe
from builder.recipe.target_facts import LLMAPI, REFERENCE

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
    "batch_wait_ms": "llmapi.args.batch_wait_timeout_ms",
    "stream_interval": "llmapi.args.stream_interval",
}
FRACTIONS = ("kv_fraction", "batch_wait_ms")  # values that need not be whole
ON_GPU = ("kv_fraction", "max_num_tokens")  # the reference executor has no pool of KV blocks and no packed batches
TEXT_MODELS = ("preprocessing_instances", "postprocessing_instances", "bls_instances")  # the gateway does their work
OF_ENGINES = ("queue_delay", *TEXT_MODELS)  # Triton's batching and models, which the llmapi target does not have
# Of the LLM class: how long it waits for more requests to begin a batch with, and every how many steps an answer is
# sent (_torch/pyexecutor/executor_request_queue.py and py_executor.py, TensorRT-LLM 1.2).
OF_LLM = tuple(name for name, key in KEYS.items() if key.startswith("llmapi."))
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

    UsageError for an unknown name, values that are none, and what has no effect on this target.
    """
    found = tuple(_parameter(text) for text in asked) or defaults(recipe)
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--search names {name} twice.", hint=EXAMPLE)
        _check_effect(name, recipe)
    return found


def _check_effect(name: str, recipe: Recipe) -> None:
    """UsageError for what has no effect on the recipe's target."""
    if name in ON_GPU and recipe.target == REFERENCE.name:
        raise UsageError(
            f"{name} has no effect on the reference executor.",
            why="It keeps every request's cache, and computes one request after the other; only a GPU can show it.",
            hint=f"Omit --search {name}=..., or tune on the GPU that will serve.",
        )
    if name in OF_ENGINES and recipe.target == LLMAPI.name:
        raise UsageError(
            f"{name} has no effect with the llmapi target: there is one model, and the LLM API does the batching.",
            hint=f"Omit --search {name}=... It can vary {', '.join(_known(recipe))}.",
        )
    if name in OF_LLM and recipe.target != LLMAPI.name:
        raise UsageError(
            f"{name} is an argument of TensorRT-LLM's LLM class, which the {recipe.target} target does not use.",
            hint=f"Omit --search {name}=..., or use --target llmapi.",
        )


def _known(recipe: Recipe) -> list[str]:
    """What can be varied for the recipe's target."""
    without = OF_ENGINES if recipe.target == LLMAPI.name else OF_LLM
    return [name for name in KEYS if name not in without]


def defaults(recipe: Recipe) -> tuple[Parameter, ...]:
    """Batch size around the recipe's; what delays a batch, or how many tokens are in one; and on a GPU the share of
    memory for the KV cache."""
    size, tokens = recipe.engine.max_batch_size, recipe.engine.max_num_tokens
    found = [Parameter("max_batch_size", tuple(sorted({max(1, size // 4), max(1, size // 2), size, 2 * size})))]
    if recipe.target == LLMAPI.name:  # nothing is built anew for another number
        found.append(Parameter("max_num_tokens", (tokens // 2, tokens, 2 * tokens)))
    else:
        found.append(Parameter("queue_delay", (0, 100, 1000, 5000)))
    if recipe.target != REFERENCE.name:
        found.append(Parameter("kv_fraction", (0.8, 0.85, 0.9, 0.95)))
    return tuple(found)


def settings_of(recipe: Recipe, parameters: Sequence[Parameter]) -> dict[str, Value]:
    """The recipe's own values: {name: value}. An argument that it leaves out has its version's default."""
    tree = recipe.model_dump()
    found = {}
    for one in parameters:
        part, key = one.key.split(".", 1)
        if part == "llmapi":
            name = key.removeprefix("args.")
            given, known = recipe.llmapi.args, llmapi_versions.load(recipe.engine.tensorrt_llm).arguments
            found[one.name] = given[name] if name in given else known[name]["default"]
        else:
            found[one.name] = tree[part][key]
    return found


def check_value(recipe: Recipe, name: str, value: Value) -> None:
    """UsageError for an argument of the LLM class that its version does not take; the recipe knows none of them."""
    if name in OF_LLM:
        facts = llmapi_versions.load(recipe.engine.tensorrt_llm)
        llmapi_versions.check(facts, KEYS[name].removeprefix("llmapi.args."), value)


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
