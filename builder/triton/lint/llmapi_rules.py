"""Faults in 1/model.yaml, which Triton's model for TensorRT-LLM's LLM class reads."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from builder.core import paths
from builder.core.untrusted_text import parse_yaml
from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import FILL, UNFILLED, ModelFiles

FILE = "model.yaml"
OWN = ("model", "backend", "triton_config")  # what the file has beside arguments of the LLM class
ALIKE = 0.85
SWITCHES = "triton_config"
# llmapi/tensorrt_llm/1/model.py@044a90d2 reads both without a default.
NEEDED = {"max_batch_size": int, "decoupled": bool}
PERIOD = "cancellation_check_period_ms"
SIZES = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_input_len", "tensor_parallel_size",
         "pipeline_parallel_size")  # fmt: skip


def check(model: ModelFiles) -> Iterator[Finding]:
    """All of them; none for a model without the file."""
    for number in model.versions:
        path = model.directory / str(number) / FILE
        if path.is_file():
            yield from _check(model, path)


def _check(model: ModelFiles, path: Path) -> Iterator[Finding]:
    file = str(path.relative_to(model.root))
    text = path.read_text(encoding="utf-8", errors="replace")

    def finding(key: str, what: str, fix: str) -> Finding:
        return Finding("llmapi", file, _line(text, key), f"{model.name}: {what}", fix)

    for number, line in enumerate(text.split("\n"), 1):
        if any(mark in line.partition("#")[0] for mark in UNFILLED):
            what = f"{model.name}: a placeholder is not filled: {line.strip()[:80]}"
            yield Finding("unfilled", file, number, what, FILL)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        mark = getattr(error, "problem_mark", None)
        at = mark.line + 1 if mark else 0
        said = "it nests too deep" if isinstance(error, RecursionError) else str(getattr(error, "problem", error))
        yield Finding("syntax", file, at, f"{model.name}: it is no YAML: {said}", "Correct the text.")
        return
    if not isinstance(content, Mapping):
        yield finding("", "it is not a mapping of keys to values", "Write model: ... and triton_config: ...")
        return
    if not isinstance(content.get("model"), str) or not content["model"]:
        yield finding("model", "it names no model", "Write model: a directory, or the name of a model on the Hub.")
    switches = content.get(SWITCHES)
    near = difflib.get_close_matches(SWITCHES, [str(key) for key in content], 1, 0.8)
    if not isinstance(switches, Mapping):
        at = near[0] if near else ""
        yield finding(at, f"it has no {SWITCHES}", f"Write {SWITCHES}: {{max_batch_size: 0, decoupled: true}}.")
    else:
        yield from _switches(model, switches, finding)
    for key in SIZES:
        value = content.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield finding(key, f"{key} is {value!r}", "Write a number of 1 or more.")
    yield from _misspelt(content, finding)
    kv = content.get("kv_cache_config")
    share = kv.get("free_gpu_memory_fraction") if isinstance(kv, Mapping) else None
    if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
        yield finding("free_gpu_memory_fraction", f"free_gpu_memory_fraction is {share!r}", "Write a number up to 1.")


def _misspelt(content: Mapping[Any, Any], finding: Any) -> Iterator[Finding]:
    """Arguments of the LLM class that are almost those of a known version. Others may be a later version's."""
    known = arguments()
    for name in _dotted(content):
        parent, dot, key = name.rpartition(".")
        alike = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == parent]
        near = difflib.get_close_matches(key, alike, 1, ALIKE)
        if near and key not in alike and (dot or key not in OWN):
            yield finding(key, f"{name} is not an argument of the LLM class", f"Write {parent}{dot}{near[0]}.")


@functools.cache
def arguments() -> frozenset[str]:
    """The LLM class's arguments of all known versions by dotted name, and the mappings that hold some of them."""
    found = parse_yaml(paths.data("configs", "trtllm", "llmapi.yaml").read_bytes(), own=True)["arguments"]
    return frozenset(found) | {name.partition(".")[0] for name in found}


def _dotted(content: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        yield str(key)
        if isinstance(value, Mapping) and key != SWITCHES:
            yield from (f"{key}.{inner}" for inner in value)


def _switches(model: ModelFiles, switches: Mapping[str, Any], finding: Any) -> Iterator[Finding]:
    for key, kind in NEEDED.items():
        value = switches.get(key)
        if key not in switches:
            yield finding(SWITCHES, f"{SWITCHES} has no {key}", f"Write {key}: its model.py has no default.")
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            titles = {int: "a number", bool: "true or false"}
            yield finding(key, f"{SWITCHES}.{key} is {value!r}", f"Write {titles[kind]}.")
    period = switches.get(PERIOD, 100)
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        yield finding(PERIOD, f"{SWITCHES}.{PERIOD} is {period!r}", "Write a number of 1 or more, in milliseconds.")
    text, stated = model.text.first("model_transaction_policy"), switches.get("decoupled")
    decoupled = model.message.model_transaction_policy.decoupled if model.message is not None else None
    if text is not None and isinstance(stated, bool) and decoupled is not None and stated != decoupled:
        said = f"{SWITCHES}.decoupled is {str(stated).lower()}, and {model.file} says {str(decoupled).lower()}"
        yield finding("decoupled", said, "Write the same in both.")


def _line(text: str, key: str) -> int:
    """The line of a key; 0 where it is not found."""
    lines = (number for number, line in enumerate(text.split("\n"), 1) if line.strip().startswith(f"{key}:"))
    return next(lines, 0) if key else 0
