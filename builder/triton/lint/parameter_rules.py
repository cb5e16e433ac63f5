"""Faults in the parameters of NVIDIA's models for TensorRT-LLM engines, and of ours with the same names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from builder.recipe.triton_parameters import kinds, known, wrong
from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import FILL, ModelFiles

TEXT = ("preprocessing", "postprocessing", "tensorrt_llm_bls")  # or with a prefix, in a repository of several models
UNSET = re.compile(r"\s*|\$\{\w*\}")
ALIKE = 0.85


def role(model: ModelFiles) -> str | None:
    """Which of NVIDIA's models it is, whatever its name; None for any other."""
    runs_engine = model.message.backend == "python" and "gpt_model_type" in model.message.parameters
    if model.message.backend == "tensorrtllm" or runs_engine:
        return "tensorrt_llm"
    if model.message.backend == "python":
        return named(model.name, TEXT)
    return None


def named(name: str, roles: Sequence[str]) -> str | None:
    """Which of these names a model has, itself or after a prefix, as in a repository of several models."""
    return next((one for one in roles if name == one or name.endswith(f"_{one}")), None)


def is_unset(value: str) -> bool:
    """Whether the backend takes this value as none: empty, or a placeholder that a template tool left."""
    return UNSET.fullmatch(value) is not None


def check(model: ModelFiles) -> Iterator[Finding]:
    """Parameters that are missing, misspelt, or of another kind; and placeholders in parameters that are not known."""
    which = role(model)
    known_kinds = kinds(which) if which else {}
    values = model.parameters
    for key in known()["required"].get(which, ()) if which else ():
        if is_unset(values.get(key, "")):
            at = model.parameter(key)
            fix = f'Add parameters {{ key: "{key}" value: {{ string_value: "..." }} }}.'
            said = f"parameter {key} has no value" if at else f"parameter {key} is missing"
            yield model.finding("parameter", at, said, f"Give {key} its value." if at else fix)
    for key, value in values.items():
        at = model.parameter(key)
        if key not in known_kinds:
            near = difflib.get_close_matches(key, known_kinds, 1, ALIKE)
            if near and near[0] not in values:
                yield model.finding("parameter", at, f"parameter {key} is not read", f"Write {near[0]}.")
            if "${" in value:
                yield model.finding("unfilled", at, f"parameter {key} is {value}", FILL)
        elif not is_unset(value) and (should := wrong(known_kinds[key], value)):
            yield model.finding("parameter", at, f"parameter {key} is {value!r}", f"Write {should}.")


def tokenizers(models: Sequence[ModelFiles]) -> Iterator[Finding]:
    """Text models that read another tokenizer than preprocessing, that of the same prefix."""
    roles = {model.name: (model, which) for model in models if (which := role(model)) in TEXT}
    for name, (model, which) in roles.items():
        assert which is not None
        first = f"{name.removesuffix(which)}preprocessing"
        if first not in roles:
            continue
        value, expected = (one.parameters.get("tokenizer_dir", "") for one in (model, roles[first][0]))
        if not is_unset(value) and not is_unset(expected) and Path(value) != Path(expected):
            fix = f"Name one directory in both: {expected}"
            said = f"tokenizer_dir is {value}, and that of {first} {expected}"
            yield model.finding("tokenizer", model.parameter("tokenizer_dir"), said, fix)
