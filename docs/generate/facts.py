"""Pages about what the builder knows of GPUs and of TensorRT-LLM, from configs/."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import builder
from builder.core import paths
from builder.core.untrusted_text import parse_yaml
from builder.formats import kv_cache, registry
from builder.formats.base import NumberFormat, StoredTensor
from builder.llmapi import versions as llmapi
from builder.machine import containers, gpus
from builder.machine.cards import Card
from builder.recipe import card_formats
from builder.trtllm import versions as trtllm
from docs.generate.markdown import code, say, table, text

CARD_COLUMNS = ("card", "memory, GB", "GB/s", "FP8 dense TFLOPS", "FP4 dense TFLOPS", "source")


def gpu_profiles() -> Iterator[str]:
    """Profiles with formats, flags and notes; cards with memory."""
    yield from say(
        "# GPU profiles and cards",
        "`builder gpus` prints what a recipe can choose on each. `--gpu` takes the name of a profile or of a card, in "
        "any spelling. "
        "An engine runs only on the architecture that it was built for.",
    )
    profiles = [gpus.load(name) for name in gpus.names()]
    yield from table(
        ("profile", "for", "default target", "default format"),
        [
            (f"[`{p.name}`](#{p.name})", text(p.title), code(p.target), code(p.best[0].format if p.best else ""))
            for p in profiles
        ],
    )
    yield from say(
        "The default format is chosen without `--format`. A target that does not run it gets the next one of the "
        "profile's list."
    )
    for profile in profiles:
        yield from say(f"## {profile.name}", text(profile.title))
        if profile.sm is not None:
            rows = [(code(one.format), text(one.reason)) for one in profile.best]
            yield from table(("formats, the best first", "reason"), rows)
            yield from table(("number format", "target", "since TensorRT-LLM", "source"), _runs(profile))
        if profile.recipe:
            yield from ("It sets in the recipe:", "", "```yaml", *_yaml(profile.recipe), "```", "")
        yield from (f"- {text(note)}" for note in profile.notes)
        yield ""
        if profile.flags:
            rows = [(code(n), code(f.value), text(f.reason), text(f.source)) for n, f in profile.flags.items()]
            yield from table(("flag of trtllm-build", "value", "reason", "source"), rows)
        if profile.cards:
            yield from table(CARD_COLUMNS, map(_card, profile.cards))


def _runs(profile: gpus.GpuProfile) -> Iterator[tuple[str, ...]]:
    """The rows of the formats that a profile runs; one row where the targets do not differ."""
    for name, by_target in profile.formats.items():
        for said in dict.fromkeys(by_target.values()):
            targets = ", ".join(code(target) for target, one in by_target.items() if one == said)
            yield code(name), targets, text(said.since), text(said.source)


def _card(card: Card) -> tuple[str, ...]:
    name = f"{card.name} (also: {', '.join(card.also)})" if card.also else card.name
    figures = (card.memory_gb, card.bandwidth_gb_s, card.fp8_tflops, card.fp4_tflops)
    return text(name), *("" if figure is None else text(figure) for figure in figures), text(card.source)


def _yaml(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{key}: {value}"


@functools.cache
def _versions() -> tuple[trtllm.Version, ...]:
    return tuple(trtllm.load(version) for version in trtllm.versions())


def engine_flags() -> Iterator[str]:
    """Every trtllm-build flag: meaning, what it takes, default in each version, rules; then removed flags."""
    known = _versions()
    yield from say(
        "# trtllm-build flags",
        "`builder explain FLAG` prints one of them with its sources. Set a flag with `--set engine.flags.NAME=VALUE`.",
    )
    names = dict.fromkeys(name for version in reversed(known) for name in version.flags)
    rules = known[-1].rules.values()
    rows = []
    for name in names:
        newest = next(version.flags[name] for version in reversed(known) if name in version.flags)
        choices = newest["choices"]
        takes = ", ".join(map(str, choices)) if isinstance(choices, list) else newest["kind"]
        touched = ", ".join(f"[{rule['id']}](rules.md#{rule['id'].lower()})" for rule in rules if name in rule["flags"])
        default = _by_version([(version.version, _default(version, name)) for version in known])
        rows.append((code(f"--{name}"), text(newest.get("help", "")), text(takes), default, touched))
    yield from table(("flag", "meaning", "takes", "default", "rules"), rows)
    yield from say("## Removed flags", "The builder rejects them and names the replacement.")
    gone = {name: entry for version in known for name, entry in version.removed.items()}
    yield from table(
        ("flag", "removed in", "use instead", "source"),
        [(code(f"--{n}"), text(e["since"]), text(e["use"] or "nothing"), text(e["source"])) for n, e in gone.items()],
    )


def _by_version(values: Sequence[tuple[str, str]]) -> str:
    """One value where all versions have the same, else each version with its own."""
    if len({value for _, value in values}) == 1:
        return values[0][1]
    return "; ".join(f"{version}: {value}" for version, value in values)


def _default(version: trtllm.Version, name: str) -> str:
    if name not in version.flags:
        return "absent"
    value = version.flags[name]["default"]
    return "unset" if value in (None, "==SUPPRESS==") else code(value)


def rules() -> Iterator[str]:
    """What trtllm-build changes or rejects, by rule."""
    newest = _versions()[-1]
    yield from say(
        "# Rules of trtllm-build",
        f"What `trtllm-build` {newest.version} rejects, rewrites or warns about. The builder applies these rules "
        "before it starts, so the plan shows the values that will be used. `builder plan` and error messages "
        "name rules by id.",
    )
    for rule in newest.rules.values():
        flags = ", ".join(code(f"--{name}") for name in rule["flags"]) or "none"
        yield from say(
            f"## {rule['id']}",
            f"**When** {text(rule['when'])}.",
            f"**Effect** {text(rule['effect'])}.",
            f"Kind: {text(rule['kind'])}. Flags: {flags}. Source: {text(rule['where'])}.",
        )


def llm_arguments() -> Iterator[str]:
    """Arguments of the LLM class that the llmapi target accepts, by version range."""
    raw = llmapi.read()
    ranges = [llmapi.load(row["first"]) for row in raw["versions"]]
    labels = [r["first"] if r["first"] == r["last"] else f"{r['first']} to {r['last']}" for r in raw["versions"]]
    yield from say(
        "# LLM arguments",
        "Arguments of TensorRT-LLM's `LLM` class for `--target llmapi`. Set one with "
        "`--set llmapi.args.NAME=VALUE`. A dash means that the version does not have it.",
    )
    names = dict.fromkeys(name for facts in ranges for name in facts.arguments)
    yield from table(
        ("argument", *labels), [(code(n), *(_argument(f.arguments.get(n)) for f in ranges)) for n in names]
    )
    yield from say("## Arguments that are rejected")
    yield from table(("argument", "reason"), [(code(name), text(why)) for name, why in raw["refused"].items()])
    yield from say("## Sources", *(f"- {text(name)}: {text(source)}" for name, source in raw["states"].items()))


def _argument(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "-"
    takes = ", ".join(map(str, spec["choices"])) if isinstance(spec.get("choices"), list) else spec["type"]
    default = "unset" if spec["default"] is None else json.dumps(spec["default"])
    return f"{text(takes)}; default {code(default)}"


def versions() -> Iterator[str]:
    """Which image holds which versions."""
    yield from say(
        "# Versions and images",
        "From `configs/containers.yaml`. Empty cells: no source found. The engine path ends after 1.2.1.",
    )
    end = parse_yaml(paths.data("configs", "trtllm", "engine_path.yaml").read_text(encoding="utf-8"))
    yield from say(text(end["why"]))
    supported = set(trtllm.versions())
    rows = []
    for row in containers.rows():
        built, engine = ("yes" if yes else "no" for yes in (row.tensorrt_llm in supported, row.engine))
        others = (text(value or "") for value in (row.tensorrt, row.cuda, row.driver, row.modelopt))
        rows.append((text(row.triton or ""), text(row.tensorrt_llm), built, *others, engine, text(row.gb or "")))
    yield from table(
        (
            "Triton image",
            "TensorRT-LLM",
            "engines built here",
            "TensorRT",
            "CUDA",
            "driver",
            "ModelOpt",
            "has trtllm-build",
            "GB",
        ),
        rows,
    )


def known_errors() -> Iterator[str]:
    """Failures of trtllm-build that the builder recognizes in its log."""
    file = paths.data("configs", "trtllm", "known_errors.yaml")
    yield from say(
        "# Known trtllm-build errors",
        "When `trtllm-build` fails, the builder searches its log for these messages and prints the cause and the fix.",
    )
    for entry in parse_yaml(file.read_text(encoding="utf-8"))["errors"]:
        yield from (
            f"## {entry['name']}",
            "",
            "The log matches one of these regular expressions:",
            "",
            "```text",
            *entry["patterns"],
            "```",
            "",
            f"**Cause.** {text(entry['why'])}",
            "",
            f"**Fix.** {text(entry['hint'])}",
            "",
            f"Source: {text(entry['source'])}",
            "",
        )


def _path(layer: str) -> str:
    """builder/core/ for a package, builder/plan.py for a module."""
    package = Path(builder.__file__).parent / layer
    return f"builder/{layer}/" if package.is_dir() else f"builder/{layer}.py"


def packages() -> Iterator[str]:
    """The packages of builder/, lowest layer first, from the docstring of builder/__init__.py."""
    yield from say(
        "# Packages",
        "Lowest layer first. A module imports from its own package and from those above it in this table only.",
    )
    layers = re.findall(r"^    (\w+) +(\S.+)$", builder.__doc__ or "", re.M)
    yield from table(("package", "contents"), [(code(_path(name)), text(what)) for name, what in layers])


def formats() -> Iterator[str]:
    """Number formats of linear layers with their tensors on disk, and those of the KV cache."""
    yield from say(
        "# Number formats",
        "From `builder/formats/`. `quantization.format` chooses the format of a whole model; single layers can stay in "
        "another one with `--keep-fp8` and `--keep-bf16`.",
    )
    known = registry.all_formats().values()
    rows = []
    for found in known:
        runs = [", ".join(map(code, card_formats.cards_with(found, target))) or "none" for target in gpus.TARGETS]
        whole = "yes" if found.whole_model else "single layers"
        group = text(found.group_size or "")
        rows.append((code(found.name), text(found.title), text(found.bits), group, whole, *runs))
    headers = ("format", "name", "bits per weight", "group size", "whole model", "GPUs, `engine`", "GPUs, `llmapi`")
    yield from table(headers, rows)
    yield from say(
        "The profile `cpu` serves every format that has a TensorRT-LLM layout with the reference executor. "
        "`builder quantize` writes the others for servers that read compressed-tensors.",
        "## Tensors of a linear layer",
        "The weight of a layer has the shape [outputs, inputs].",
    )
    for found in known:
        yield from say(f"### {found.title}")
        tensors = [
            (code(t.unified), code(_second(found, t)), text(" or ".join(t.dtypes)), _dimensions(t))
            for t in found.tensors
        ]
        second = "compressed-tensors layout" if found.compressed_only else "TensorRT-LLM layout"
        yield from table(("Hugging Face layout", second, "dtype", "shape"), tensors)
    yield from say("## KV cache", "`quantization.kv_cache_dtype`, or `--kv-cache-dtype`.")
    rows = []
    for cache in kv_cache.FORMATS.values():
        runs = [", ".join(map(code, card_formats.cards_with(cache, target))) or "none" for target in gpus.TARGETS]
        rows.append((code(cache.name), text(cache.title), text(f"{cache.bits:g}"), *runs))
    yield from table(("value", "name", "bits per value", "GPUs, `engine`", "GPUs, `llmapi`"), rows)
    rejected = [(code(name), text(why)) for name, why in kv_cache.REJECTED.items()]
    yield from table(("rejected value", "reason"), rejected)


def _second(found: NumberFormat, tensor: StoredTensor) -> str:
    """A tensor's name in the layout that servers read of a format."""
    if not found.compressed_only:
        return tensor.tensorrt_llm
    return tensor.unified if tensor.compressed_tensors is None else tensor.compressed_tensors


def _dimensions(tensor: StoredTensor) -> str:
    """[outputs, inputs / 16]; one number for a tensor without dimensions."""
    names = {"out": "outputs", "in": "inputs"}
    parts = [names[dim.axis] + (f" / {dim.group}" if dim.group > 1 else "") for dim in tensor.dims]
    return f"\\[{', '.join(parts)}\\]" if parts else "one number"
