"""The arguments of TensorRT-LLM's LLM class in each version, from configs/trtllm/llmapi.yaml. Pure."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.core import paths
from builder.core.errors import UnsupportedError, UsageError
from builder.core.release import order
from builder.core.untrusted_text import parse_yaml

TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "mapping": (dict,),
}
Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """The arguments of one version by dotted name; `others` are those of other versions alone.

    `earlier`: the arguments as the state before the version has them; where the version takes more than they do, it is
    not certain that it does. `moe_sms`: the SMs on which each backend for experts runs NVFP4.
    `penalties`: whether its sampler heeds repetition, presence and frequency penalties. `images`: NVIDIA's with it.
    """

    version: str
    arguments: Mapping[str, Spec]
    others: Mapping[str, Spec]
    earlier: Mapping[str, Spec]
    refused: Mapping[str, str]
    moe_sms: Mapping[str, Sequence[int]]
    penalties: bool
    images: str | None
    source: str

    def takes(self, name: str) -> bool:
        return name in self.arguments

    def certain(self, name: str, value: Any) -> bool:
        """Whether the state before this version accepts the value too."""
        try:
            _check_value(self, self.earlier[name], name, value)
        except (KeyError, UsageError):
            return False
        return True


@functools.cache
def read() -> dict[str, Any]:
    """The content of configs/trtllm/llmapi.yaml."""
    file = paths.data("configs", "trtllm", "llmapi.yaml")
    raw: dict[str, Any] = parse_yaml(file.read_text(encoding="utf-8"))
    return raw


@functools.cache
def load(version: str) -> Facts:
    """The facts of a version. UnsupportedError, which names the known versions, for any other."""
    raw = read()
    asked = order(version)
    found = next((r for r in raw["versions"] if order(r["first"]) <= asked <= order(r["last"])), None)
    if found is None:
        raise _unknown_version(version, raw["versions"])
    earlier, later = (_in_state(raw, state) for state in found["states"])
    here = later if found["accept"] == "later" else _in_both(earlier, later)
    return Facts(
        version=version,
        arguments=here,
        others=dict(_others(raw, here, found["states"][-1])),
        earlier=earlier,
        refused=raw["refused"],
        moe_sms=_moe_sms(raw, found["states"][-1]),
        penalties=found["states"][-1] in raw["penalties"],
        images=found.get("images"),
        source="; ".join(raw["states"][state] for state in found["states"]),
    )


def _in_state(raw: Mapping[str, Any], state: str) -> dict[str, Spec]:
    """The arguments of one state of upstream's main branch."""
    states = list(raw["states"])
    now = states.index(state)
    found: dict[str, Spec] = {}
    for name, spec in raw["arguments"].items():
        first, last = spec.get("since", states[0]), spec.get("until", states[-1])
        if not states.index(first) <= now <= states.index(last):
            continue
        changes = spec.get("then", {})
        merged = {key: value for key, value in spec.items() if key not in ("since", "until", "then", "no_effect")}
        for changed in states[: now + 1]:
            merged |= changes.get(changed, {})
        ignored = spec.get("no_effect")
        if ignored and states.index(ignored["since"]) <= now:
            merged["no_effect"] = ignored["why"]
        found[name] = merged
    return found


def _in_both(earlier: Mapping[str, Spec], later: Mapping[str, Spec]) -> dict[str, Spec]:
    """What both states accept: their common values, the tighter limits, and the earlier default."""
    found = {}
    for name in earlier.keys() & later.keys():
        first, second = earlier[name], later[name]
        merged = {**second, **first}
        for key in ("choices", "of"):
            if isinstance(first.get(key), list):
                merged[key] = [word for word in first[key] if word in second[key]]
        for key, tighter in (("least", max), ("above", max), ("most", min)):
            limits = [spec[key] for spec in (first, second) if key in spec]
            if limits:
                merged[key] = tighter(limits)
        if first.get("or") != second.get("or"):
            merged.pop("or", None)
        found[name] = merged
    return {name: found[name] for name in earlier if name in found}


def _others(raw: Mapping[str, Any], here: Mapping[str, Spec], state: str) -> Iterator[tuple[str, Spec]]:
    """The arguments of other versions. One whose last state is before this version is `gone`."""
    states = list(raw["states"])
    for name, spec in raw["arguments"].items():
        if name not in here:
            removed = states.index(spec.get("until", states[-1])) < states.index(state)
            yield name, {key: value for key, value in spec.items() if key != "gone" or removed}


def _moe_sms(raw: Mapping[str, Any], state: str) -> dict[str, Sequence[int]]:
    states = list(raw["states"])
    found = {}
    for name, row in raw["moe_backends"].items():
        changes = row.get("then", {})
        changed = [changes[s] for s in states[: states.index(state) + 1] if s in changes]
        found[name] = changed[-1] if changed else row["sms"]
    return found


def _unknown_version(version: str, ranges: list[dict[str, Any]]) -> UnsupportedError:
    known = [r["first"] if r["first"] == r["last"] else f"{r['first']} to {r['last']}" for r in ranges]
    first = ranges[0]["first"]
    if order(version) < order(first):
        what = f"The llmapi target needs TensorRT-LLM {first} or later, and {version} was asked for."
        return UnsupportedError(what, why=f"Known: {', '.join(known)}.", hint=f"--set engine.tensorrt_llm={first}")
    return UnsupportedError(
        f"The LLM arguments of TensorRT-LLM {version} are not known here.",
        why=f"Known: {', '.join(known)}.",
        hint=f"--set engine.tensorrt_llm={first}",
    )


def check(facts: Facts, name: str, value: Any) -> None:
    """UsageError unless this version's LLM class accepts `name` (dotted) with this value."""
    refused = next((reason for key, reason in facts.refused.items() if name == key or name.startswith(f"{key}.")), None)
    if refused:
        raise UsageError(f"llmapi.args.{name} is not taken here: {refused}.", hint=f"Leave {name} out.")
    if name == "cuda_graph_config" and value is None:
        return  # upstream's way to turn CUDA graphs off
    if name not in facts.arguments:
        raise _unknown_argument(facts, name)
    _check_value(facts, facts.arguments[name], name, value)


def _check_value(facts: Facts, spec: Spec, name: str, value: Any) -> None:
    if (value is None and spec["default"] is None) or ("or" in spec and value == spec["or"]):
        return
    kind = TYPES[spec["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
        also = f" or {spec['or']!r}" if "or" in spec else ""
        raise UsageError(f"llmapi.args.{name} takes a value of type {spec['type']}{also}, not {value!r}.")
    if isinstance(value, list):
        _check_list(name, value, spec.get("of"))
    choices = spec.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        others = f" {spec['others'][0].upper()}{spec['others'][1:]}." if "others" in spec else ""
        raise UsageError(
            f"llmapi.args.{name} takes one of {', '.join(choices)}, not {value!r}.",
            why=f"TensorRT-LLM {facts.version}." + (f" Did you mean {near[0]!r}?" if near else "") + others,
        )
    below = ("least" in spec and value < spec["least"]) or ("above" in spec and value <= spec["above"])
    if below or ("most" in spec and value > spec["most"]):
        raise UsageError(f"llmapi.args.{name} is {value!r}, and takes {_limits(spec)}.")


def _limits(spec: Spec) -> str:
    if "above" in spec:
        return f"more than {spec['above']}" + (f", up to {spec['most']}" if "most" in spec else "")
    return f"{spec['least']} to {spec['most']}" if "most" in spec else f"{spec['least']} or more"


def _check_list(name: str, value: list[Any], of: list[str] | str | None) -> None:
    """A list of these words, of texts (`of` says what they are), or of numbers from 1 on; never an empty one."""
    if isinstance(of, str):
        fits, said = all(isinstance(n, str) and n for n in value), f"{of}s"
    elif of:
        fits, said = all(n in of for n in value), ", ".join(of)
    else:
        fits, said = all(type(n) is int and n > 0 for n in value), "numbers from 1 on"
    if not value or not fits:
        raise UsageError(f"llmapi.args.{name} takes a list of {said}, not {value!r}.")


def _unknown_argument(facts: Facts, name: str) -> UsageError:
    what = f"{name} is not a known argument of the LLM class of TensorRT-LLM {facts.version}."
    if name in facts.others:
        gone = facts.others[name].get("gone")
        why = f"It was removed: {gone}." if gone else "It came later, or is not certain for this version."
        return UsageError(what, why=f"{why} Read in: {facts.source}.", hint=f"Leave {name} out.")
    if inside := [key for key in facts.arguments if key.startswith(f"{name}.")]:
        return UsageError(
            f"llmapi.args.{name} holds arguments, and is none itself.",
            hint=f"--set llmapi.{_example(facts, inside[0])}",
        )
    # A key on the wrong level is the likeliest slip: free_gpu_memory_fraction without kv_cache_config.
    last = name.rpartition(".")[2]
    near = [key for key in facts.arguments if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, facts.arguments, n=1)
    return UsageError(
        what,
        why=f"Did you mean {' or '.join(near)}?" if near else f"Read in: {facts.source}.",
        hint=f"`builder explain {near[0]}`." if near else "All that are known: configs/trtllm/llmapi.yaml.",
    )


def _example(facts: Facts, name: str) -> str:
    default = facts.arguments[name]["default"]
    return f"args.{name}={str(default).lower() if default is not None else 'VALUE'}"
