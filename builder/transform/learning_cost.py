"""The memory and the time that learning rotations takes. Pure; estimates, of float32."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

CHUNK = 256  # tokens whose logits exist at once
LIBRARIES = 600_000_000  # bytes of a process that has torch and transformers
# Square matrices in float64 that exist at once of one that is learned: itself, the next, gradient, and those of a step.
COPIES = 8


@dataclass(frozen=True)
class Shape:
    """A model's sizes. parameters: all of them. width: activations of one token in a layer (preflight/memory.py)."""

    parameters: int
    hidden: int
    layers: int
    vocabulary: int
    width: int


def memory(shape: Shape, *, tokens: int, heads: Collection[int]) -> int:
    """Bytes. tokens: of the longest row. heads: sizes of the matrices that are learned beside R1."""
    hidden = shape.hidden
    matrices = 8 * COPIES * hidden**2 + 2 * 8 * sum(size**2 for size in heads)
    states = 4 * tokens * hidden * (shape.layers + 1)
    activations = 4 * tokens * (3 * shape.width + 8 * hidden)  # of a layer, with what rounding and gradients add
    logits = 4 * 4 * min(CHUNK, tokens) * shape.vocabulary
    return LIBRARIES + 4 * shape.parameters + matrices + states + activations + logits


def operations(*, active: int, tokens: int, hidden: int, layers: int) -> int:
    """Multiplications and additions of all steps: a forward pass, the same again for the gradients, and these, of the
    active parameters and of two products with R1 before each half of a layer. tokens: of all steps."""
    return 4 * 2 * tokens * (active + 4 * layers * hidden**2)
