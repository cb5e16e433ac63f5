"""The tensors that a model must consist of, by its config.json, for the architectures that have a table here. Pure.

Names and shapes are those of transformers' classes (models/{llama,mistral,qwen2,qwen3}/modeling_*.py, 4.57 and 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.checkpoint.layouts import ARCHITECTURES, head_size
from builder.model.config_values import SHAPE

# What the table is computed from, and what the layouts need beside it.
NEEDED = (*SHAPE, "max_position_embeddings")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Want:
    """A tensor's shape, and how config.json comes to it."""

    shape: tuple[int, ...]
    by: str


def known(config: Mapping[str, Any]) -> bool:
    """Whether there is a table for this model's architecture."""
    return (config.get("architectures") or [""])[0] in ARCHITECTURES


def expected(config: Mapping[str, Any]) -> dict[str, Want]:
    """Every tensor of the model. A tied model has no head of its own."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    table = {
        EMBEDDING: Want((vocab, hidden), "vocab_size x hidden_size"),
        NORM: Want((hidden,), "hidden_size"),
    }
    if not config.get("tie_word_embeddings"):
        table[HEAD] = Want((vocab, hidden), "vocab_size x hidden_size")
    layer = _layer(config)
    for number in range(config["num_hidden_layers"]):
        table |= {f"model.layers.{number}.{name}": want for name, want in layer.items()}
    return table


def _layer(config: Mapping[str, Any]) -> dict[str, Want]:
    name, size = config["architectures"][0], head_size(config)
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads") or heads
    q, kv, mlp = (heads * size, "heads x head size"), (kv_heads * size, "KV heads x head size"), (inner, "intermediate")
    width = (hidden, "hidden_size")
    linears = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    found = {f"{norm}.weight": Want((hidden,), "hidden_size") for norm in norms}
    if name == "Qwen3ForCausalLM":
        found |= {f"self_attn.{norm}.weight": Want((size,), "head size") for norm in ("q_norm", "k_norm")}
    for linear, ((rows, by_rows), (columns, by_columns)) in linears.items():
        found[f"{linear}.weight"] = Want((rows, columns), f"{by_rows} x {by_columns}")
        if _has_bias(config, name, linear):
            found[f"{linear}.bias"] = Want((rows,), by_rows)
    return found


def _has_bias(config: Mapping[str, Any], architecture: str, linear: str) -> bool:
    """Qwen2's q, k and v always have one, Mistral's layers never; of the others config.json says it."""
    if architecture == "Qwen2ForCausalLM":
        return linear.endswith(("q_proj", "k_proj", "v_proj"))
    if architecture == "MistralForCausalLM":
        return False
    if linear.startswith("self_attn."):
        return bool(config.get("attention_bias"))
    return architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias"))
