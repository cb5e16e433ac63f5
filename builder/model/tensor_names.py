"""The tensors that a model must consist of, by its config.json, for architectures whose tensors are known. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.architectures import catalog, shapes
from builder.architectures.facts import TensorNames
from builder.model.config_values import SHAPE

# What the table is computed from, and what the layouts need beside it.
NEEDED = (*SHAPE, "max_position_embeddings")


@dataclass(frozen=True)
class Want:
    """A tensor's shape, and how config.json comes to it."""

    shape: tuple[int, ...]
    by: str


def table(config: Mapping[str, Any]) -> TensorNames | None:
    """The names of this architecture's tensors; None if only transformers knows them."""
    return catalog.of(config).tensors


def known(config: Mapping[str, Any]) -> bool:
    """Whether this architecture's tensors are known."""
    return table(config) is not None


def embedding(config: Mapping[str, Any]) -> str:
    """The name of the embedding's weight."""
    names = table(config)
    return f"{names.embedding if names else 'model.embed_tokens'}.weight"


def head(config: Mapping[str, Any]) -> str:
    """The name of the output layer's weight."""
    names = table(config)
    return f"{names.head if names else 'lm_head'}.weight"


def expected(config: Mapping[str, Any]) -> dict[str, Want]:
    """Every tensor of a model of a known architecture. A tied model has no head of its own."""
    names = table(config)
    assert names is not None
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found = {
        f"{names.embedding}.weight": Want((vocab, hidden), "vocab_size x hidden_size"),
        f"{names.final_norm}.weight": Want((hidden,), "hidden_size"),
    }
    if not config.get("tie_word_embeddings"):
        found[f"{names.head}.weight"] = Want((vocab, hidden), "vocab_size x hidden_size")
    layer = _layer(config, names)
    for number in range(config["num_hidden_layers"]):
        found |= {f"{names.layers}.{number}.{name}": want for name, want in layer.items()}
    return found


def _layer(config: Mapping[str, Any], names: TensorNames) -> dict[str, Want]:
    """The tensors of one decoder layer."""
    linears, norms, architecture = shapes.linears(config), shapes.norms(config), catalog.of(config)
    found = {f"{name}.weight": Want((norms[role].size,), norms[role].by) for role, name in names.norms.items()}
    for role, name in names.linears.items():
        rows, columns = linears[role]
        found[f"{name}.weight"] = Want((rows.size, columns.size), f"{rows.by} x {columns.by}")
        if shapes.has_bias(architecture, config, role):
            found[f"{name}.bias"] = Want((rows.size,), rows.by)
    return found
