"""The facts of each TensorRT-LLM version: flags, rules, removed and doubtful features. Pure.

They are data in configs/trtllm/<version>/; this file contains no version number.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.core import paths
from builder.core.errors import UnsupportedError, UsageError
from builder.core.release import order
from builder.core.untrusted_text import parse_yaml


@dataclass(frozen=True)
class Version:
    """One TensorRT-LLM version, from configs/trtllm/<version>/."""

    version: str
    facts: Mapping[str, Any]
    flags: Mapping[str, Mapping[str, Any]]
    build_config_defaults: Mapping[str, Any]
    rules: Mapping[str, Mapping[str, Any]]
    removed: Mapping[str, Mapping[str, Any]]
    probes: Mapping[str, Any]
    sources: Mapping[str, str]
    has_triton_templates: bool


def versions() -> list[str]:
    """The known versions, oldest first."""
    found = [path.name for path in paths.data("configs", "trtllm").iterdir() if path.is_dir()]
    return sorted(found, key=order)


@functools.cache
def load(version: str) -> Version:
    """The facts of a version. UnsupportedError for an unknown version or one without an engine path."""
    if version not in versions():
        raise _unknown_version(version)
    directory = paths.data("configs", "trtllm", version)

    def read(name: str) -> Any:
        return json.loads((directory / name).read_text(encoding="utf-8"))

    raw, doubts = read("flags.json"), directory / "probes.yaml"
    return Version(
        version=version,
        facts=parse_yaml((directory / "version.yaml").read_text(encoding="utf-8")),
        flags={flag["name"].removeprefix("--"): flag for flag in raw["flags"]},
        build_config_defaults=raw["build_config_defaults"],
        rules={rule["id"]: rule for rule in read("rules.json")["rules"]},
        removed={entry["flag"]: entry for entry in read("removed.json")["removed"]},
        probes=parse_yaml(doubts.read_text(encoding="utf-8")) if doubts.is_file() else {},
        sources=raw["sources"],
        has_triton_templates=(directory / "triton-tensors.json").is_file(),
    )


def _unknown_version(version: str) -> UnsupportedError:
    end = parse_yaml(paths.data("configs", "trtllm", "engine_path.yaml").read_text(encoding="utf-8"))
    build_with = f"--set engine.tensorrt_llm={end['last']}"
    if order(version) >= order(end["gone_from"]):
        return UnsupportedError(
            f"TensorRT-LLM {version} builds no engines: they end before {end['gone_from']}.",
            why=end["why"],
            hint=f"Build with {build_with}, or {end['instead']}.",
        )
    return UnsupportedError(
        f"TensorRT-LLM {version} is not known here.", why=f"Known: {', '.join(versions())}.", hint=build_with
    )


def check(version: Version, name: str, value: str) -> None:
    """UsageError, with the nearest valid flag or value, unless this version's trtllm-build accepts `--name value`."""
    if name not in version.flags:
        raise _unknown_flag(version, name)
    spec = version.flags[name]
    choices = ["enable", "disable"] if spec["kind"] == "bool_str" else spec["choices"]
    if spec["kind"] == "store_true":
        choices = ["enable", "disable", ""]
    if isinstance(choices, list) and value not in choices:
        near = difflib.get_close_matches(value, [c for c in choices if c], n=1)
        raise UsageError(
            f"--{name} takes one of {', '.join(c for c in choices if c)}, not {value!r}.",
            why=f"TensorRT-LLM {version.version}." + (f" Did you mean {near[0]!r}?" if near else ""),
        )
    if spec["kind"] == "int" and not re.fullmatch(r"[0-9]+", value):
        raise UsageError(f"--{name} takes a number, not {value!r}.")


def _unknown_flag(version: Version, name: str) -> UsageError:
    plain = name.lstrip("-").replace("-", "_")
    aliases = {a.lstrip("-"): real for real, spec in version.flags.items() for a in spec.get("aliases", [])}
    what = f"trtllm-build {version.version} has no flag --{name}."
    if plain in aliases:
        return UsageError(f"--{name} is another name of --{aliases[plain]}.", hint=f"Use {aliases[plain]}.")
    if plain in version.removed:
        gone = version.removed[plain]
        return UsageError(
            what,
            why=f"It was removed in {gone['since']} ({gone['source']}).",
            hint=f"What replaced it: {gone['use'] or 'nothing'}.",
        )
    near = [plain] if plain in version.flags else difflib.get_close_matches(plain, version.flags, n=1)
    return UsageError(
        what,
        why=f"Did you mean --{near[0]}?" if near else "",
        hint=f"`builder explain {near[0] if near else 'FLAG'}`; all flags: "
        f"configs/trtllm/{version.version}/flags.json.",
    )
