"""What learning rotations takes on this machine, and whether it fits. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from builder.architectures.attention import head_size
from builder.core.errors import UnsupportedError
from builder.core.output import size
from builder.preflight.memory import activation_width
from builder.preflight.model_facts import ModelFacts
from builder.preflight.ways import Device, active_parameters
from builder.recipe.schema import Recipe
from builder.transform import learning_cost

OPERATIONS = 4e10  # per second and core in float32: a quarter of BF16's rate in preflight/ways.py


@dataclass(frozen=True)
class Learning:
    """memory: bytes on the device. seconds: an estimate for a CPU; None for a GPU, where nothing was measured. refusal:
    why this machine can't do it."""

    memory: int
    seconds: float | None
    refusal: UnsupportedError | None


def learning(recipe: Recipe, model: ModelFacts, on: Device) -> Learning | None:
    """What learning the recipe's rotations takes; None if none are learned. model: the rotated one."""
    part, config = recipe.transform, model.config
    if not part.learns:
        return None
    tokens = min(recipe.calibration.seq_len, int(config.get("max_position_embeddings") or recipe.calibration.seq_len))
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    shape = learning_cost.Shape(
        parameters=sum(math.prod(shape) for _, shape in model.tensors.values()),
        hidden=hidden,
        layers=layers,
        vocabulary=int(config.get("vocab_size") or 0),
        width=activation_width(config, 1),
    )
    heads = [head_size(config)] * layers if "r2" in part.rotations else []
    needs = learning_cost.memory(shape, tokens=tokens, heads=heads)
    took = learning_cost.operations(
        active=active_parameters(model), tokens=part.learning.steps * part.learning.rows * tokens, hidden=hidden,
        layers=layers,
    )  # fmt: skip
    seconds = None if on.gpu else took / (OPERATIONS * on.cores)
    has = on.largest if on.gpu else on.memory
    return Learning(needs, seconds, _refusal(needs, has, on) if has is not None and needs > has else None)


def _refusal(needs: int, has: int, on: Device) -> UnsupportedError:
    return UnsupportedError(
        f"Learning rotations takes about {size(needs)}, and {on.name} has {size(has)}.",
        why="It holds the whole model in float32, with the gradients of one decoder layer.",
        hint="Use shorter rows (--calib-seq-len 512), a machine with more memory, or random rotations: "
        "--set transform.kind=hadamard",
    )
