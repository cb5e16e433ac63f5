"""Whether an engine's GPU memory for LoRA adapters holds one of them: otherwise the engine is not loaded. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from builder.core.errors import UnsupportedError
from builder.core.output import size
from builder.lora import cache
from builder.preflight.memory import Memory, Serving
from builder.targets.base import Inputs, Settings

SHARE = cache.GPU_FRACTION_KEY
MOST = Fraction(99, 100)  # something must be left for the KV cache


def serving(asked: Serving, inputs: Inputs, settings: Settings) -> Serving:
    """With what the adapters of the engine take."""
    values = {setting.name: str(setting.value) for setting in settings}
    if not asked.facts.builds_tensorrt or "lora_target_modules" not in values:
        return asked
    largest = cache.adapter_bytes(values["lora_target_modules"].split(), int(values["max_lora_rank"]), inputs.config)
    share = inputs.resolved.recipe.repository.parameters.get(SHARE, str(cache.GPU_FRACTION))
    return replace(asked, adapter=largest, adapter_fraction=min(Fraction(share), MOST))


def refusal(asked: Serving, found: Memory) -> UnsupportedError | None:
    """The error if an engine's share of the memory of a card does not hold the largest adapter, else None."""
    beside = found.memory - found.weights - found.workspace
    room = math.floor(beside * asked.adapter_fraction)
    if room >= asked.adapter:
        return None
    enough = math.ceil(asked.adapter / beside * 100) / 100
    larger = f"Give them more: --set repository.parameters.{SHARE}={enough:g}. Or use" if enough < 1 else "Use"
    return UnsupportedError(
        f"The LoRA adapters do not fit on {found.card}: the largest takes {size(asked.adapter)}, and {size(room)} are "
        "for adapters.",
        why=f"{SHARE} is {float(asked.adapter_fraction):g} of the {size(beside)} beside weights and workspace; "
        "TensorRT-LLM does not load an engine whose cache can't hold one adapter of the largest rank.",
        hint=f"{larger} adapters of a smaller rank.",
    )
