"""What the reference executor supports. Imports nothing heavy, so that a plan can reject a model before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.architectures import catalog
from builder.architectures.attention import rope
from builder.core.errors import UnsupportedError

ACTIVATIONS = ("silu", "swiglu")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def engine_architectures() -> tuple[str, ...]:
    """The values of `architecture` in a TensorRT-LLM checkpoint's config.json that the executor runs."""
    known = (one.engine.architecture for one in catalog.every() if one.engine and one.reference)
    return tuple(dict.fromkeys(known))


def check_model(config: Mapping[str, Any]) -> None:
    """UnsupportedError if the executor can't run the model of this Hugging Face config.json, which has a TensorRT-LLM
    layout (`served.check_engine`)."""
    if catalog.name_of(config) not in catalog.served_by("reference"):
        raise UnsupportedError(
            f"The reference executor can't run {catalog.name_of(config)}.",
            why=f"It runs {', '.join(catalog.served_by('reference'))}.",
            hint="TensorRT-LLM may run it on a GPU: --gpu sm120, for example (`builder gpus`).",
        )
    _, scaling = rope(config)
    found = {
        "hidden_act": (config.get("hidden_act") or catalog.of(config).config.defaults["hidden_act"], ACTIVATIONS),
        "rope_type": ((scaling or {}).get("rope_type", "default"), ROPE_TYPES),
    }
    wrong = {name: (value, known) for name, (value, known) in found.items() if value not in known}
    if wrong:
        raise UnsupportedError(
            f"The reference executor can't run this model: {', '.join(f'{n} {v!r}' for n, (v, _) in wrong.items())}.",
            why="; ".join(f"It supports {name} {', '.join(known)}" for name, (_, known) in wrong.items()) + ".",
            hint="TensorRT-LLM may run it on a GPU: --gpu sm120, for example (`builder gpus`).",
        )
