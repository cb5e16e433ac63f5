"""The sampling values of requests that name none: from the recipe and from the model's generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from builder.core.errors import IntegrityError
from builder.model.files import json_object
from builder.recipe.schema import SamplingDefaults

FILE = "generation_config.json"
SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # with the values that change nothing
OF_FILE = (*SAMPLED, "repetition_penalty")


def sampling_defaults(snapshot: Path, part: SamplingDefaults) -> dict[str, Any]:
    """{name: value} of a model's directory and the recipe's `repository.sampling_defaults`; empty without any.

    Temperature, top_p and top_k come together: an engine that gets a temperature alone decodes greedily
    (triton_backend/all_models/inflight_batcher_llm of TensorRT-LLM 1.2.1 sets neither of the others). IntegrityError if
    generation_config.json has a value that is none.
    """
    asked = part.model_dump(exclude={"from_model"}, exclude_none=True)
    found = {**(_of_model(snapshot) if part.from_model else {}), **asked}
    return {**SAMPLED, **found} if found.keys() & SAMPLED.keys() else found


def _of_model(snapshot: Path) -> dict[str, Any]:
    """As transformers reads it: `do_sample: false` makes temperature, top_p and top_k void."""
    config = json_object(snapshot / FILE)
    names = OF_FILE if config.get("do_sample") is not False else ("repetition_penalty",)
    values = {name: config[name] for name in names if config.get(name) is not None}
    try:
        return SamplingDefaults.model_validate(values, strict=True).model_dump(
            exclude={"from_model"}, exclude_none=True
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise IntegrityError(
            f"{snapshot / FILE} has {name} {values[name]!r}, which is not a sampling value.",
            why=f"{first['msg']}.",
            hint=f"Correct the file, or set it: --set repository.sampling_defaults.{name}=VALUE --set "
            "repository.sampling_defaults.from_model=false",
        ) from error
