"""What a machine has for the steps of a sweep, and what a step takes of it: cores, memory, GPUs. From the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from builder.evaluate import memory as measuring
from builder.preflight import ways
from builder.preflight.memory import Machine
from builder.preflight.prepare import Prepared
from builder.sweep.graph import Kind

SMALL = 500_000_000  # bytes of a process that holds no weights: Python, tokenizer, rows
LIGHT = ("fetch", "calibrate")  # kinds that load no weights
MEASURING = ("baseline", "measure", "build", "load")  # with the whole model, or layer by layer
LIBRARIES = ways.LIBRARIES["whole"]


@dataclass(frozen=True)
class Slots:
    """Cores, bytes of host memory, and GPUs."""

    cores: int
    memory: int
    gpus: int = 0

    def holds(self, other: Slots) -> bool:
        """Whether the other fits in."""
        return self.cores >= other.cores and self.memory >= other.memory and self.gpus >= other.gpus

    def minus(self, other: Slots) -> Slots:
        """What is left without the other."""
        return Slots(self.cores - other.cores, self.memory - other.memory, self.gpus - other.gpus)

    def plus(self, other: Slots) -> Slots:
        """Both together."""
        return self.minus(Slots(-other.cores, -other.memory, -other.gpus))

    def within(self, whole: Slots) -> Slots:
        """At most the whole: a step that needs more than there is runs alone, and its own checks refuse it."""
        return Slots(min(self.cores, whole.cores), min(self.memory, whole.memory), min(self.gpus, whole.gpus))


def of_step(kind: Kind, prepared: Prepared, host: Machine, cores: int) -> Slots:
    """What a step takes with so many cores. On a machine with GPUs, one that computes takes as many as it needs. A
    server is measured with nothing beside it, so it takes all cores."""
    if kind in LIGHT:
        return Slots(1, SMALL)
    on = ways.device(host)
    choice = prepared.way(host)
    quantizing = choice.taken.memory if choice else 0
    found = measuring.needs(prepared.model, measuring.CPU_TOKENS, float32=not on.gpu)
    evaluating = found.low if choice and choice.taken.name == "low" else found.whole
    needed = evaluating if kind in MEASURING else quantizing
    cores = on.cores if kind == "load" else cores
    if not on.gpu:
        return Slots(cores, LIBRARIES + needed)
    gpus = math.ceil(needed / on.largest) if on.largest else 1
    gpus = max(gpus, prepared.recipe.engine.world_size) if kind in ("build", "load") else gpus
    return Slots(cores if kind == "load" else 1, LIBRARIES, gpus)
