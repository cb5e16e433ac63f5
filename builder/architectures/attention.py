"""Attention as config.json describes it: head sizes, rotary embedding, sliding window. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.architectures import catalog
from builder.architectures.facts import SlidingWindow
from builder.core.errors import IntegrityError, UnsupportedError

# transformers computes these from original_max_position_embeddings, and takes max_position_embeddings without it.
_NEED_ORIGINAL = ("llama3", "yarn")


def head_size(config: Mapping[str, Any]) -> int:
    """Width of an attention head, by the config.json of a model or of a TensorRT-LLM checkpoint. Llama's and Mistral's
    may leave head_dim out."""
    given = config.get("head_dim") or config.get("head_size")
    return int(given or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: Mapping[str, Any]) -> int:
    """Number of heads that keys and values have."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


# Kinds of decoder layers (`layer_types`, `layers_block_type`) that keep no keys and values: their state does not grow.
_WITHOUT_CACHE = ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp")


def shared_kv_layers(config: Mapping[str, Any]) -> range:
    """The last layers, which use the keys and values of earlier ones and keep none (transformers 5.14,
    models/gemma3n/modeling_gemma3n.py and gemma4/modeling_gemma4.py, is_kv_shared_layer)."""
    layers = int(config["num_hidden_layers"])
    return range(layers - min(layers, max(0, int(config.get("num_kv_shared_layers") or 0))), layers)


def attention_layers(config: Mapping[str, Any]) -> int:
    """The number of layers that keep keys and values. Layers of a hybrid model may keep a state of constant size
    instead, or share the keys and values of an earlier layer."""
    layers = shared_kv_layers(config).start
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if pattern := config.get("hybrid_override_pattern"):  # Nemotron-H: M is Mamba, - an MLP, E experts
        return int(pattern.count("*"))
    if isinstance(kinds, list):
        return sum(kind not in _WITHOUT_CACHE for kind in kinds[:layers])
    if interval := config.get("full_attention_interval"):  # Qwen3-Next: each n-th layer is full attention
        return layers // int(interval)
    return layers


def cached_values(config: Mapping[str, Any], tp: int = 1) -> int:
    """The number of values that one token adds to the KV cache of a tensor parallel rank, in all layers together.

    Multi-head latent attention keeps one compressed vector and the rotated part of the key for all heads, on each rank
    (DeepSeek-V2, arXiv 2405.04434, section 2.1). Layers of full attention may have heads of their own (Gemma 4). KV
    heads are repeated if there are fewer than ranks.
    """
    layers = attention_layers(config)
    if latent := config.get("kv_lora_rank"):
        return layers * (int(latent) + int(config.get("qk_rope_head_dim") or 0))
    each = 2 * max(kv_heads(config) // tp, 1) * head_size(config)
    own = (config.get("layer_types") or [])[: shared_kv_layers(config).start]
    full = own.count("full_attention") if config.get("global_head_dim") else 0
    if not full:
        return layers * each
    heads = int(config.get("num_global_key_value_heads") or kv_heads(config))
    return (layers - full) * each + full * 2 * max(heads // tp, 1) * int(config["global_head_dim"])


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """The number of last tokens that the attention of some layers is limited to; None if no layer is limited."""
    facts = catalog.of(config).sliding_window or SlidingWindow(source="transformers: most configurations")
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not isinstance(window, int) or window < 1 or not config.get("use_sliding_window", facts.by_default):
        return None
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    first = config.get(facts.first_layer, 0) if facts.first_layer else 0
    return window if first < config.get("num_hidden_layers", first + 1) else None


def rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base of the rotary embedding, and its scaling or None, from a config.json as transformers 4 or 5 writes it.

    IntegrityError if it names two bases, UnsupportedError for a kind that TensorRT-LLM's engines do not compute for
    this architecture.
    """
    parameters = config.get("rope_parameters") or {}
    bases = {float(b) for b in (config.get("rope_theta"), parameters.get("rope_theta")) if b is not None}
    if len(bases) > 1:
        raise IntegrityError(f"config.json names two bases of the rotary embedding: {sorted(bases)}.")
    scaling = {**parameters, **(config.get("rope_scaling") or {})}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    rotated = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    known = rope_types(config)
    if kind not in ("default", *known) or rotated != 1.0 or any(isinstance(v, dict) for v in parameters.values()):
        raise UnsupportedError(
            f"The rotary embedding {dict(scaling)} has no TensorRT-LLM layout here.",
            why=f"It must rotate the whole head, without scaling or with one of these: {', '.join(known)}.",
        )
    scaling.pop("rope_theta", None)
    if kind in _NEED_ORIGINAL:  # TensorRT-LLM takes 8192 or 4096 without it
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    base = bases.pop() if bases else float(catalog.of(config).config.defaults["rope_theta"])
    return base, None if kind == "default" else {**scaling, "type": kind, "rope_type": kind}


def rope_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of rotary scaling that TensorRT-LLM's engines compute for this architecture."""
    engine = catalog.of(config).engine
    return engine.rope_types if engine else ()
