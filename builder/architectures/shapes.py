"""Shapes of a decoder layer's tensors by role, and which layers have a bias, by config.json alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.architectures.attention import head_size, kv_heads
from builder.architectures.facts import ALWAYS, Architecture, NormRole, Role


@dataclass(frozen=True)
class Width:
    """One dimension of a tensor, and how config.json comes to it."""

    size: int
    by: str


def linears(config: Mapping[str, Any]) -> dict[Role, tuple[Width, Width]]:
    """(outputs, inputs) of each linear layer, the shape of its weight; q, k and v apart, gate and up apart."""
    size, heads = head_size(config), int(config["num_attention_heads"])
    hidden = Width(config["hidden_size"], "hidden_size")
    inner = Width(config["intermediate_size"], "intermediate")
    q, kv = Width(heads * size, "heads x head size"), Width(kv_heads(config) * size, "KV heads x head size")
    return {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }


def norms(config: Mapping[str, Any]) -> dict[NormRole, Width]:
    """The width of each norm, whether or not the architecture has it."""
    hidden, head = Width(config["hidden_size"], "hidden_size"), Width(head_size(config), "head size")
    return {"input": hidden, "post_attention": hidden, "q": head, "k": head}


def has_bias(architecture: Architecture, config: Mapping[str, Any], role: Role) -> bool:
    """Whether transformers gives this linear layer a bias."""
    by = architecture.biases.get(role)
    return by is not None and (by == ALWAYS or bool(config.get(by)))
