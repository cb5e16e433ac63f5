"""Faults in the parameters of NVIDIA's models for TensorRT-LLM engines, and of ours with the same names."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from builder.core import paths
from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import FILL, ModelFiles

SWITCHES = ("true", "false", "True", "False", "TRUE", "FALSE", "1", "0")
UNSET = re.compile(r"\s*|\$\{\w*\}")
ALIKE = 0.85
PATTERNS = {
    "count": (r"[1-9]\d*", "a number of 1 or more"),
    "number": (r"\d+", "a number of 0 or more"),
    "counts": (r"\d+(,\d+)*", "numbers with commas between them"),
    "devices": (r"\d+([,;]\d+)*", "numbers of GPUs with commas between them"),
}


@functools.cache
def known() -> Mapping[str, Any]:
    """configs/triton/parameters.yaml."""
    found: Mapping[str, Any] = yaml.safe_load(paths.data("configs", "triton", "parameters.yaml").read_text("utf-8"))
    return found


def role(model: ModelFiles) -> str | None:
    """Which of NVIDIA's models it is, whatever its name; None for any other."""
    runs_engine = model.message.backend == "python" and "gpt_model_type" in model.message.parameters
    if model.message.backend == "tensorrtllm" or runs_engine:
        return "tensorrt_llm"
    if model.message.backend == "python" and model.name in ("preprocessing", "postprocessing", "tensorrt_llm_bls"):
        return model.name
    return None


def is_unset(value: str) -> bool:
    """Whether the backend takes this value as none: empty, or a placeholder that a template tool left."""
    return UNSET.fullmatch(value) is not None


def check(model: ModelFiles) -> Iterator[Finding]:
    """Parameters that are missing, misspelt, or of another kind; and placeholders in parameters that are not known."""
    which = role(model)
    kinds = known()[which] if which else {}
    values = model.parameters
    for key in known()["required"].get(which, ()) if which else ():
        if is_unset(values.get(key, "")):
            at = model.parameter(key)
            fix = f'Add parameters {{ key: "{key}" value: {{ string_value: "..." }} }}.'
            said = f"parameter {key} has no value" if at else f"parameter {key} is missing"
            yield model.finding("parameter", at, said, f"Give {key} its value." if at else fix)
    for key, value in values.items():
        at = model.parameter(key)
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1, ALIKE)
            if near and near[0] not in values:
                yield model.finding("parameter", at, f"parameter {key} is not read", f"Write {near[0]}.")
            if "${" in value:
                yield model.finding("unfilled", at, f"parameter {key} is {value}", FILL)
        elif not is_unset(value) and (wrong := _wrong(kinds[key], value)):
            yield model.finding("parameter", at, f"parameter {key} is {value!r}", f"Write {wrong}.")


def _wrong(kind: str | Sequence[str], value: str) -> str:
    """What the value should be and is not, or ""."""
    if not isinstance(kind, str):
        return "" if value in kind else " or ".join(kind)
    if "${" in value:
        return "a value instead of the placeholder"
    if kind == "switch":
        return "" if value in SWITCHES else "true or false"
    if kind == "fraction":
        return "" if _is_fraction(value) else "a number from 0 to 1"
    pattern, title = PATTERNS.get(kind, (".*", ""))
    return "" if re.fullmatch(pattern, value) else title


def _is_fraction(value: str) -> bool:
    try:
        return 0 <= float(value) <= 1
    except ValueError:
        return False


def tokenizers(models: Sequence[ModelFiles]) -> Iterator[Finding]:
    """Text models that read different tokenizers."""
    found = {
        model.name: (model, value)
        for model in models
        if role(model) in ("preprocessing", "postprocessing", "tensorrt_llm_bls")
        and not is_unset(value := model.parameters.get("tokenizer_dir", ""))
    }
    if "preprocessing" not in found:
        return
    _, expected = found["preprocessing"]
    for model, value in found.values():
        if Path(value) != Path(expected):
            fix = f"Name one directory in both: {expected}"
            said = f"tokenizer_dir is {value}, and that of preprocessing {expected}"
            yield model.finding("tokenizer", model.parameter("tokenizer_dir"), said, fix)
