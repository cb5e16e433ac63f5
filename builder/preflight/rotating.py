"""The time that folding rotations into a model's weights takes. Pure; an estimate."""

from __future__ import annotations

import math

from builder.preflight.model_facts import ModelFacts
from builder.recipe.schema import Recipe

# Nanoseconds for each value of the model: processor time of transform/writing.py with one thread, for random models of
# Qwen3's shape with hidden sizes of 1,024, 2,048 and 4,096. Hadamard matrices took 34, 27 and 32 for each value, whole
# matrices 75 and 156 (1,024 and 2,048), which grows with the hidden size.
HADAMARD_NS = 31.0
WHOLE_NS = 0.075  # and for each row of R1


def seconds(recipe: Recipe, model: ModelFacts) -> float | None:
    """What folding the recipe's rotations takes; None if there are none. model: the rotated one."""
    part = recipe.transform
    if not part.rotates:
        return None
    values = sum(math.prod(shape) for _, shape in model.tensors.values())
    whole = part.kind != "hadamard" and "r1" in part.rotations
    each = max(HADAMARD_NS, WHOLE_NS * int(model.config["hidden_size"])) if whole else HADAMARD_NS
    return values * each / 1e9
