"""What TensorRT-LLM's LLM class takes in each version, from configs/trtllm/llmapi.yaml, and what is refused. Pure."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder import paths
from builder.errors import UnsupportedError, UsageError
from builder.foreign_text import parse_yaml
from builder.trtllm_facts import order

TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "mapping": (dict,),
}


@dataclass(frozen=True)
class Facts:
    """The arguments of one version by dotted name; `others` are those of other versions alone.

    `penalties`: whether its sampler heeds repetition, presence and frequency penalties. `images`: NVIDIA's with it.
    """

    version: str
    arguments: Mapping[str, Mapping[str, Any]]
    others: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, str]
    architectures: tuple[str, ...]
    trtllm_moe_below_sm: int
    penalties: bool
    images: str | None
    source: str


@functools.cache
def read() -> dict[str, Any]:
    """The whole file."""
    file = paths.data("configs", "trtllm", "llmapi.yaml")
    raw: dict[str, Any] = parse_yaml(file.read_text(encoding="utf-8"))
    return raw


@functools.cache
def load(version: str) -> Facts:
    """The facts of a version. UnsupportedError with the known ones for another."""
    raw = read()
    asked = order(version)
    found = next((r for r in raw["versions"] if order(r["first"]) <= asked <= order(r["last"])), None)
    if found is None:
        raise _unknown_version(version, raw["versions"])
    states = found["states"]
    everywhere = list(raw["states"])
    here = {name: spec for name, spec in raw["arguments"].items() if set(states) <= set(spec.get("in", everywhere))}
    return Facts(
        version=version,
        arguments=here,
        others={name: spec for name, spec in raw["arguments"].items() if name not in here},
        refused=raw["refused"],
        architectures=tuple(raw["architectures"]),
        trtllm_moe_below_sm=raw["trtllm_moe_below_sm"],
        penalties=states[-1] in raw["penalties"],
        images=found.get("images"),
        source="; ".join(raw["states"][state] for state in states),
    )


def _unknown_version(version: str, ranges: list[dict[str, Any]]) -> UnsupportedError:
    known = [r["first"] if r["first"] == r["last"] else f"{r['first']} to {r['last']}" for r in ranges]
    first = ranges[0]["first"]
    if order(version) < order(first):
        what = f"The llmapi target needs TensorRT-LLM {first} or later, and {version} was asked for."
        return UnsupportedError(what, why=f"Known: {', '.join(known)}.", cure=f"--set engine.tensorrt_llm={first}")
    return UnsupportedError(
        f"The LLM arguments of TensorRT-LLM {version} are not known here.",
        why=f"Known: {', '.join(known)}.",
        cure=f"--set engine.tensorrt_llm={first}",
    )


def check(facts: Facts, name: str, value: Any) -> None:
    """UsageError unless this version's LLM class takes `name` (dotted below a config) with this value."""
    refused = next((reason for key, reason in facts.refused.items() if name == key or name.startswith(f"{key}.")), None)
    if refused:
        raise UsageError(f"llmapi.args.{name} is not taken here: {refused}.", cure=f"Leave {name} out.")
    if name == "cuda_graph_config" and value is None:
        return  # upstream's way to turn CUDA graphs off
    if name not in facts.arguments:
        raise _unknown_argument(facts, name)
    spec = facts.arguments[name]
    if value is None and spec["default"] is None:
        return
    kind = TYPES[spec["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
        raise UsageError(f"llmapi.args.{name} takes a value of type {spec['type']}, not {value!r}.")
    if isinstance(value, list):
        _check_list(name, value, spec.get("of"))
    choices = spec.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise UsageError(
            f"llmapi.args.{name} takes one of {', '.join(choices)}, not {value!r}.",
            why=f"TensorRT-LLM {facts.version}." + (f" Did you mean {near[0]!r}?" if near else ""),
        )
    if ("least" in spec and value < spec["least"]) or ("most" in spec and value > spec["most"]):
        limits = f"{spec['least']} to {spec['most']}" if "most" in spec else f"{spec['least']} or more"
        raise UsageError(f"llmapi.args.{name} is {value!r}, and takes {limits}.")


def _check_list(name: str, value: list[Any], words: list[str] | None) -> None:
    """A list of these words, or of numbers from 1 on; never an empty one."""
    if not value or not all(n in words if words else type(n) is int and n > 0 for n in value):
        of = ", ".join(words) if words else "numbers from 1 on"
        raise UsageError(f"llmapi.args.{name} takes a list of {of}, not {value!r}.")


def _unknown_argument(facts: Facts, name: str) -> UsageError:
    what = f"{name} is no known argument of the LLM class of TensorRT-LLM {facts.version}."
    if name in facts.others:
        gone = facts.others[name].get("gone")
        why = f"It was removed: {gone}." if gone else "It came later, or is not certain for this version."
        return UsageError(what, why=f"{why} Read in: {facts.source}.", cure=f"Leave {name} out.")
    if inside := [key for key in facts.arguments if key.startswith(f"{name}.")]:
        return UsageError(
            f"llmapi.args.{name} holds arguments, and is none itself.",
            cure=f"--set llmapi.{_example(facts, inside[0])}",
        )
    # A key on the wrong level is the likeliest slip: free_gpu_memory_fraction without kv_cache_config.
    last = name.rpartition(".")[2]
    near = [key for key in facts.arguments if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, facts.arguments, n=1)
    return UsageError(
        what,
        why=f"Did you mean {' or '.join(near)}?" if near else f"Read in: {facts.source}.",
        cure=f"`builder explain {near[0]}`." if near else "All that are known: configs/trtllm/llmapi.yaml.",
    )


def _example(facts: Facts, name: str) -> str:
    default = facts.arguments[name]["default"]
    return f"args.{name}={str(default).lower() if default is not None else 'VALUE'}"
