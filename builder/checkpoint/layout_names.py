"""Names and shapes of the tensors in each layout of a checkpoint, except the scales of quantized layers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.architectures import catalog, names, shapes
from builder.architectures.facts import Engine


@dataclass(frozen=True)
class LayoutNames:
    """Modules of a layout. `linears`, {name: (outputs, inputs)}, `norms`, {name: width}, `biases` (the linear layers
    that have one) and `attention` (which the scales of the KV cache are named after) are below `layers`.N."""

    embedding: str
    layers: str
    final_norm: str
    head: str
    linears: Mapping[str, tuple[int, int]]
    norms: Mapping[str, int]
    biases: frozenset[str]
    attention: str


def unified(config: Mapping[str, Any]) -> LayoutNames | None:
    """The Hugging Face layout; None for an architecture without a table of tensors."""
    architecture = catalog.of(config)
    table = architecture.tensors
    if table is None:
        return None
    sizes, widths = shapes.linears(config), shapes.norms(config)
    return LayoutNames(
        embedding=table.embedding,
        layers=table.layers,
        final_norm=table.final_norm,
        head=table.head,
        linears={name: (sizes[role][0].size, sizes[role][1].size) for role, name in table.linears.items()},
        norms={name: widths[role].size for role, name in table.norms.items()},
        biases=frozenset(n for role, n in table.linears.items() if shapes.has_bias(architecture, config, role)),
        attention=table.attention,
    )


def tensorrt_llm(config: Mapping[str, Any]) -> LayoutNames | None:
    """TensorRT-LLM's layout, in which fused layers are concatenated in dim 0, by its own config.json; None for an
    architecture that no known model is served as."""
    engine = catalog.engine_of(config)
    if engine is None:
        return None
    sizes, widths = shapes.linears(config), shapes.norms(config)
    has_qk_norm = bool(config.get("qk_layernorm", engine.config.get("qk_layernorm")))
    return LayoutNames(
        embedding=names.ENGINE_EMBEDDING,
        layers=names.ENGINE_LAYERS,
        final_norm=names.ENGINE_FINAL_NORM,
        head=names.ENGINE_HEAD,
        linears={
            name: (sum(sizes[role][0].size for role in roles), sizes[roles[0]][1].size)
            for name, roles in names.ENGINE_LINEARS.items()
        },
        norms={n: widths[role].size for n, role in names.ENGINE_NORMS.items() if has_qk_norm or role not in ("q", "k")},
        biases=frozenset(name for name in names.ENGINE_LINEARS if _engine_bias(engine, config, name)),
        attention="attention",
    )


def _engine_bias(engine: Engine, config: Mapping[str, Any], linear: str) -> bool:
    if linear == "attention.dense" and not engine.output_bias:
        return False
    keys = ("attention_bias", "attn_bias") if linear.startswith("attention.") else ("mlp_bias",)
    return any(bool(config.get(key)) for key in keys)
