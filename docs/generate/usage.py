"""Pages about using the builder: commands, recipe keys, presets, exit codes, environment variables."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from builder.cli import main
from builder.core import errors, paths
from builder.recipe.schema import schema
from docs.generate.markdown import code, say, table, text

RECIPE_GROUP = "recipe"  # title of the option group that all commands with a recipe share

# Every variable that the builder reads itself; tests/docs/test_generated.py compares the names with the code.
ENVIRONMENT: Mapping[str, str] = {
    "BUILDER_OUTPUT": "Default of `--output`.",
    "BUILDER_STORE": "A bucket, `s3://BUCKET/PREFIX`, through which machines share what they make.",
    "BUILDER_IMAGE": "Default of `--image`, the image that `serve --container` and `smoke --container` run.",
    "BUILDER_CHILD_ENV": "Names of further variables to pass to worker processes, separated by commas.",
    "BUILDER_KERNELS": "What packs weights: `avx512`, `avx2`, `baseline` or `torch`. All give the same bytes.",
    "BUILDER_LLMAPI_LAUNCH": "`1` starts a server with one rank through `trtllm-llmapi-launch` too (llmapi target).",
    "BUILDER_FORCE_NUM_PROFILES": "Debugs `trtllm-build`. The builder refuses to build while it is set.",
    "MODEL_REPOSITORY": "The repository that `serve`, `gateway`, `smoke` and `bench` use if none is named.",
    "UNGATED": "`1` means `--ungated`: serve a repository that failed its quality check or accuracy gate.",
    "MEMLOCK": "Limit of locked memory for `serve --container`, in bytes. Default: -1, no limit.",
    "HF_TOKEN": "Token for gated models. It is passed only to processes that talk to the Hub and is never written.",
    "HF_TOKEN_PATH": "A file with that token.",
    "HF_HOME": "Directory of the Hugging Face cache.",
    "HF_ENDPOINT": "A mirror of the Hub.",
    "HF_HUB_OFFLINE": "`1` uses the local cache only.",
    "TRANSFORMERS_OFFLINE": "The same as `HF_HUB_OFFLINE`.",
    "CUDA_VISIBLE_DEVICES": "GPUs that the builder may use. An empty value means the CPU.",
    "CUDA_DEVICE_ORDER": "Order in which CUDA counts GPUs. Default here: `PCI_BUS_ID`, as NVML counts them.",
    "OMP_NUM_THREADS": "Threads of the reference executor and of CPU calibration.",
    "OMP_WAIT_POLICY": "Default here: `passive`, so that threads do not spin.",
    "TRTLLM_NO_USAGE_STATS": "`0` allows TensorRT-LLM to send usage data, if the recipe enables it too.",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "Collector for the gateway's traces, such as `http://localhost:4318`.",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "The same with the path, for traces only.",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "Must be `http/protobuf` if it is set.",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "The same for traces only.",
    "OTEL_RESOURCE_ATTRIBUTES": "What describes the gateway in its traces.",
    "OTEL_SERVICE_NAME": "Its name there. Default: `trtllm-builder-gateway`.",
    "OTEL_SDK_DISABLED": "`true` turns traces off.",
    "OTEL_TRACES_EXPORTER": "`none` turns them off, too.",
    "TMPDIR": "First choice for temporary directories.",
    "XDG_CACHE_HOME": "Second choice for the server's private directory, and the parent of the default cache.",
    "XDG_RUNTIME_DIR": "Third choice for the server's private directory.",
}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Every command of the builder with its parser, in the order of the help."""
    [action] = [a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def summaries() -> dict[str, str]:
    """The one-line help of each command."""
    [action] = [a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {choice.dest: choice.help or "" for choice in action._choices_actions}


def options(group: Any) -> Iterator[tuple[str, str]]:
    """(option with its placeholder, help) of each visible option of an argument group."""
    for action in group._group_actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            placeholder = action.metavar or action.dest.split(".")[-1].upper()
            name = f"{name} {placeholder if isinstance(placeholder, str) else ' '.join(placeholder)}"
        yield code(name), text((action.help or "").replace("%(default)s", str(action.default)))


def commands() -> Iterator[str]:
    """Commands and their options."""
    yield from say("# Commands", "Every command takes `--help`. With `--json` it prints one JSON object on stdout.")
    parsers, lines = subcommands(), summaries()
    yield from table(("command", "purpose"), [(f"[`builder {n}`](#builder-{n})", text(lines[n])) for n in lines])
    shared: Any = None
    for name, parser in parsers.items():
        if name not in lines:  # a former name that still works
            continue
        yield from say(f"## builder {name}", text(parser.description or lines[name]))
        groups = [group for group in parser._action_groups if list(options(group))]
        for group in groups:
            if (group.title or "").startswith(RECIPE_GROUP):
                shared = shared or group
                yield from say("It also takes all [recipe options](#recipe-options).")
            else:
                yield from table((text(group.title), "meaning"), options(group))
        if parser.epilog:
            yield from ("```text", parser.epilog.strip(), "```", "")
    yield from say(
        "## Recipe options",
        "Each sets one [recipe key](recipe.md). Settings are resolved in this order: "
        "flag, `--set`, recipe file, preset, GPU profile, default.",
    )
    yield from table(("option", "meaning"), options(shared))


# Recipe


def kind(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The type of a JSON Schema in words: `integer, 1 to 1024`, `latency or throughput`, `list of string`."""
    if "$ref" in spec:
        return kind(definitions[spec["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in spec:
        return " or ".join(kind(part, definitions) for part in spec["anyOf"])
    if "enum" in spec:
        return " or ".join(str(value) for value in spec["enum"])
    if "const" in spec:
        return str(spec["const"])
    if spec.get("type") == "array":
        return f"list of {kind(spec.get('items', {}), definitions)}"
    name = {"null": "unset", "object": "mapping"}.get(spec.get("type", ""), spec.get("type", "any"))
    low, high = spec.get("minimum", spec.get("exclusiveMinimum")), spec.get("maximum", spec.get("exclusiveMaximum"))
    above = "above " if "exclusiveMinimum" in spec else ""
    if low is not None and high is not None and high < 2**31 - 1:
        return f"{name}, {above}{low} to {high}"
    return f"{name}, {above or 'at least '}{low}" if low is not None else name


def recipe() -> Iterator[str]:
    """Every key of a recipe: type, default, meaning, flag."""
    whole = schema()
    definitions = whole["$defs"]
    flags = {a.dest: a.option_strings[0] for a in subcommands()["eval"]._actions if a.option_strings}
    yield from say(
        "# Recipe keys",
        "A recipe is a YAML file. Every key can also be set with `--set KEY=VALUE`; common "
        "keys have a flag. Unknown keys are errors.",
    )

    def row(key: str, spec: Mapping[str, Any]) -> tuple[str, ...]:
        default = "" if spec.get("default") in (None, [], {}) else code(json.dumps(spec["default"]))
        return (
            code(key),
            text(kind(spec, definitions)),
            default,
            text(spec.get("description", "")),
            code(flags.get(key, "")),
        )

    headers = ("key", "type", "default", "meaning", "flag")
    parts = {key: spec for key, spec in whole["properties"].items() if _part(spec, definitions)}
    yield from table(headers, [row(key, spec) for key, spec in whole["properties"].items() if key not in parts])
    for key, spec in parts.items():
        part = _part(spec, definitions)
        yield from say(f"## {key}", text(part.get("description", "")))
        yield from table(headers, [row(*one) for one in _leaves(key, part, definitions)])
    for name in ("DataSet",):
        yield from say(
            "## A data set",
            "An entry of `evaluation.data`, and the value of `sensitivity.data`. A bare "
            "string is the same as `data` alone.",
        )
        yield from table(headers, [row(key, field) for key, field in definitions[name]["properties"].items()])


def _leaves(key: str, part: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, property) of each plain value of a part, and of the parts in it."""
    for name, spec in part["properties"].items():
        within = _part(spec, definitions)
        yield from _leaves(f"{key}.{name}", within, definitions) if within else [(f"{key}.{name}", spec)]


def _part(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that a property of the recipe holds; empty for a plain value."""
    name = spec.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = definitions.get(name, {})
    return found if "properties" in found else {}


def presets() -> Iterator[str]:
    """The presets, as they stand in configs/presets."""
    yield from say(
        "# Presets and recipes", "`--preset NAME` sets several keys at once. A recipe file and flags override it."
    )
    yield from _files("configs/presets")
    yield from say("## Recipes to start from", "Copy one and pass it with `--recipe FILE`.")
    yield from _files("configs/recipes", level=3)


def _files(directory: str, level: int = 2) -> Iterator[str]:
    for file in sorted(paths.data(*directory.split("/")).glob("*.yaml")):
        yield from say(f"{'#' * level} {file.stem}", f"`{directory}/{file.name}`")
        yield from ("```yaml", file.read_text(encoding="utf-8").strip(), "```", "")


def exit_codes() -> Iterator[str]:
    """Exit codes with the errors that raise them, from the docstring of builder/core/errors.py."""
    yield from say(
        "# Exit codes",
        "Every error message says what happened, why, and what to type next. With `--json` "
        "the object holds `error` (`what`, `why`, `hint`) and `exit_code`.",
    )
    found = re.findall(r"^[├└]── (\w+) +(\d) +(.+)$", errors.__doc__ or "", re.M)
    rows = [("0", "", "success")]
    rows += [(number, code(name), text(meaning)) for name, number, meaning in found]
    yield from table(("exit code", "error class", "meaning"), [*rows, ("130", "", "interrupted (Ctrl-C, SIGTERM)")])
    yield from say(
        "A command whose result can't be written to stdout (full disk, closed pipe) exits with 1 after its work "
        "is done. `>&-` discards the result on purpose."
    )


def environment() -> Iterator[str]:
    """Variables that the builder reads."""
    yield from say("# Environment variables")
    yield from table(("variable", "meaning"), [(code(name), text(meaning)) for name, meaning in ENVIRONMENT.items()])
    yield from say(
        "Worker processes get a fixed list of variables: those of CUDA, MPI, TensorRT-LLM, threads, locale and "
        "caches. See [Security](../security.md)."
    )
