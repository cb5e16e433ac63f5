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

SHARE = "lora_cache_gpu_memory_fraction"


def serving(asked: Serving, inputs: Inputs, settings: Settings) -> Serving:
    """With what the adapters of the engine take."""
    values = {setting.name: str(setting.value) for setting in settings}
    if not asked.facts.builds_tensorrt or "lora_target_modules" not in values:
        return asked
    largest = cache.adapter_bytes(values["lora_target_modules"].split(), int(values["max_lora_rank"]), inputs.config)
    share = inputs.resolved.recipe.repository.parameters.get(SHARE, str(cache.GPU_FRACTION))
    return replace(asked, adapter=largest, adapter_fraction=Fraction(share))


def refusal(asked: Serving, found: Memory) -> UnsupportedError | None:
    """The error if the memory that is left on a card does not hold the largest adapter, else None."""
    beside = found.memory - found.weights - found.workspace
    left = beside - found.kv_cache
    if not asked.adapter or left * asked.adapter_fraction >= asked.adapter:
        return None
    fits = math.floor((1 - asked.adapter / asked.adapter_fraction / beside) * 100) / 100
    smaller = f"Leave more: --set repository.kv_cache_free_gpu_mem_fraction={fits:g}. Or use" if fits > 0 else "Use"
    return UnsupportedError(
        f"The LoRA adapters do not fit on {found.card}: the largest takes {size(asked.adapter)}, and "
        f"{size(math.floor(left * asked.adapter_fraction))} are left for adapters.",
        why=f"{SHARE} of {float(asked.adapter_fraction):g} of the {size(left)} beside weights, workspace and KV cache; "
        "TensorRT-LLM does not load an engine whose cache can't hold one adapter.",
        hint=f"{smaller} adapters of a smaller rank.",
    )
