"""Which part of a Hugging Face tensor each rank holds: the pipeline stage of its layer and its shape. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from builder.architectures import names
from builder.architectures.attention import kv_heads
from builder.architectures.facts import Architecture
from builder.preflight.model_facts import ModelFacts


def stage_layer(architecture: Architecture, name: str) -> int:
    """The layer whose pipeline stage holds this tensor: the embedding is with the first, what follows the layers with
    the last (-1)."""
    layer = names.layer_of(architecture, name)
    if layer is not None:
        return layer
    return 0 if names.is_embedding(architecture, name.removesuffix(".weight")) else -1


def rank_shape(name: str, shape: Sequence[int], model: ModelFacts, tp: int) -> tuple[int, ...]:
    """A rank's shape of a Hugging Face tensor; all ranks of a stage have the same (checkpoint/sharding.py, `shard`)."""
    module, _, leaf = name.rpartition(".")
    role = names.role(model.architecture, module)
    if tp == 1 or not shape:
        return tuple(shape)
    if role in ("k", "v"):
        heads = kv_heads(model.config)
        return (shape[0] * max(heads // tp, 1) // heads, *shape[1:])
    if role in names.COLUMN_PARALLEL:
        return (shape[0] // tp, *shape[1:])
    if role in names.ROW_PARALLEL and leaf == "weight":
        return (shape[0], shape[1] // tp)
    if names.is_embedding(model.architecture, module) or names.is_head(model.architecture, module):
        return (math.ceil(shape[0] / tp), *shape[1:])
    return tuple(shape)
