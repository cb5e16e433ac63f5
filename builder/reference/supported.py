"""What the reference executor can run. Imports nothing heavy, so that a plan can reject a model before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.checkpoint.layouts import rope
from builder.core.errors import UnsupportedError

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
ACTIVATIONS = ("silu", "swiglu")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_model(config: Mapping[str, Any]) -> None:
    """UnsupportedError if the executor can't run the model of this Hugging Face config.json.

    The architecture itself is `checkpoint.architecture`'s to check: the executor runs all that have the layout.
    """
    _, scaling = rope(config)
    found = {
        "hidden_act": (config.get("hidden_act") or "silu", ACTIVATIONS),
        "rope_type": ((scaling or {}).get("rope_type", "default"), ROPE_TYPES),
    }
    wrong = {name: (value, known) for name, (value, known) in found.items() if value not in known}
    if wrong:
        raise UnsupportedError(
            f"The reference executor can't run this model: {', '.join(f'{n} {v!r}' for n, (v, _) in wrong.items())}.",
            why="; ".join(f"It knows {name} {', '.join(known)}" for name, (_, known) in wrong.items()) + ".",
            hint="TensorRT-LLM may run it on a GPU: --gpu sm120, for example (`builder gpus`).",
        )
