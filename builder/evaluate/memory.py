"""Whether a model is measured whole or one decoder layer at a time (runners/layered.py), and what each way takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from builder.architectures import names
from builder.core.errors import NotMeasurable
from builder.core.safetensors_io import byte_size
from builder.core.store import Store
from builder.evaluate.variants import Models
from builder.model.source_tensors import open_tensors
from builder.preflight import ways
from builder.preflight.memory import Machine, activation_width, calibration_memory, machine
from builder.preflight.model_facts import ModelFacts
from builder.recipe.schema import Recipe

Way = Literal["whole", "low"]
LIBRARIES = 600_000_000  # bytes of a process that has torch and transformers
CPU_TOKENS, CPU_LOGITS = 2048, 1 << 30  # a batch on a CPU: runners/scoring.py


@dataclass(frozen=True)
class Needs:
    """Bytes of the whole model with its libraries and the logits of a batch, and of one layer at a time with them."""

    whole: int
    low: int


def needs(model: ModelFacts, tokens: int, *, float32: bool = False) -> Needs:
    """What measuring takes, in host memory without a GPU. tokens: of a batch.

    A whole model takes no more than calibration. Layer by layer it is the largest of the embedding, the output layer,
    and one and a half decoder layers (the next one is read ahead), and the activations of a batch. SmolLM2-135M took
    2.4 GB whole in float32: libraries 0.6, weights 0.6, the rest three copies of the logits. The hidden states of the
    texts, for which a share of the free memory is used, are not counted.
    """
    width, vocab = 2 if float32 else 1, int(model.config.get("vocab_size") or 0)
    fixed = LIBRARIES + 3 * min(CPU_LOGITS, 4 * CPU_TOKENS * vocab)
    layers: dict[int | None, int] = {}
    outside = 0
    for name, (dtype, shape) in model.written.items():
        layer, nbytes = names.layer_of(model.architecture, name), byte_size(dtype, shape)
        if layer is None:
            outside = max(outside, nbytes)
        else:
            layers[layer] = layers.get(layer, 0) + nbytes
    largest = max(outside, 3 * max(layers.values(), default=0) // 2)
    activations = 2 * tokens * activation_width(model.config, 1)
    return Needs(fixed + width * calibration_memory(model, tokens), fixed + width * (largest + activations))


def way(recipe: Recipe, found: Needs, has: int | None) -> Way:
    """How to measure: as the recipe says (quantization.memory) or, with auto, whole if that fits. has: bytes of memory;
    None if it is unknown."""
    asked = recipe.quantization.memory
    if asked != "auto":
        return asked
    return "low" if has is not None and found.whole > has else "whole"


def of_model(recipe: Recipe, directory: Path, config: Mapping[str, Any], host: Machine) -> Way:
    """How to measure the model in a directory, on this machine's GPUs or, without one, on its CPU."""
    headers = {name: (info.dtype, info.shape) for name, info in open_tensors(directory).items()}
    return of_facts(recipe, ModelFacts(config, headers), host)


def of_facts(recipe: Recipe, model: ModelFacts, host: Machine) -> Way:
    """The same for a model that need not be here yet."""
    device, part = ways.device(host), recipe.evaluation
    float32 = part.dtype == "float32" or (part.dtype == "auto" and not device.gpu)
    tokens = part.batch_tokens if device.gpu else min(part.batch_tokens, CPU_TOKENS)
    return way(recipe, needs(model, tokens, float32=float32), device.memory)


def of_runner(runner: str, models: Models, recipe: Recipe, store: Store) -> Way:
    """How a runner measures; those that can't read a model layer by layer hold it whole.

    NotMeasurable for a simulation by ModelOpt where the whole model does not fit, or is not to be held.
    """
    if runner not in ("bf16", "checkpoint", "simulated"):
        return "whole"
    found = of_model(recipe, models.snapshot.path, models.snapshot.config, machine(store.root))
    if runner == "simulated" and found == "low":
        raise NotMeasurable(
            "ModelOpt's simulation needs the whole model in memory, which does not fit or which --memory low excludes.",
            hint="Measure what is stored: --runner checkpoint",
        )
    return found
