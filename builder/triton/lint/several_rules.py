"""Faults in a repository of several models: one model's ensemble or bls that calls a part of another model.

Triton loads such a repository, and the answers are those of a mixture: text that one model's tokenizer made for
another model's engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import ModelFiles
from builder.triton.lint.parameter_rules import named
from builder.triton.lint.positions import Field

CALLERS = ("ensemble", "ensemble_infer", "tensorrt_llm_bls")
CALLED = ("preprocessing", "tensorrt_llm", "postprocessing")
PARAMETERS = ("preprocessing_model_name", "tensorrt_llm_model_name")


def check(models: Mapping[str, ModelFiles]) -> Iterator[Finding]:
    """All of them. Models belong together whose names have one prefix: chat_ensemble, chat_tensorrt_llm."""
    for caller in models.values():
        role = named(caller.name, CALLERS)
        if caller.message is None or role is None:
            continue
        prefix = caller.name.removesuffix(role)
        for at, name in _calls(caller):
            own = f"{prefix}{named(name, CALLED) or ''}"
            if name in models and own in models and name != own:
                said = f"it calls {name}, which belongs to another model"
                yield caller.finding("step", at, said, f"Write {own}.")


def _calls(caller: ModelFiles) -> Iterator[tuple[Field | None, str]]:
    scheduling = caller.text.first("ensemble_scheduling")
    places = scheduling.all("step") if scheduling else []
    for place, step in zip(places, caller.message.ensemble_scheduling.step, strict=False):
        yield place.first("model_name") or place, step.model_name
    for key in PARAMETERS:
        if key in caller.parameters:
            yield caller.parameter(key), caller.parameters[key]
