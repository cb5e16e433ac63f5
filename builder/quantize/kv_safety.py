"""Which models an FP8 KV cache can ruin, judged by config.json alone. Pure.

Qwen2 and Qwen2.5 add a bias to keys and values, which holds large constants, and have no norm on keys that would remove
them; one scale for the whole cache then leaves few bits for the rest. Reports of nonsense answers:
NVIDIA/TensorRT-LLM #4218, QwenLM/Qwen3 #840, verl-project/verl #4435 (which compares it with Qwen3's QK norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.architectures import catalog
from builder.architectures.facts import ALWAYS


def warning(config: Mapping[str, Any], kv_cache_dtype: str) -> str | None:
    """What to know before quantizing the KV cache to FP8; None if it stays unquantized or nothing is against it."""
    architecture = catalog.by_model_type(config)
    biased = ALWAYS in (architecture.biases.get("k"), architecture.biases.get("v")) or config.get("attention_bias")
    has_norm = architecture.qk_norm or config.get("use_qk_norm") or config.get("qk_layernorm")
    if kv_cache_dtype != "fp8" or not biased or has_norm:
        return None
    return (
        f"{config.get('model_type') or 'this model'} has an attention bias and no QK norm: an FP8 KV cache can ruin it "
        "(TensorRT-LLM #4218, QwenLM/Qwen3 #840). Compare first: builder eval --compare-kv; or take "
        "--kv-cache-dtype auto"
    )
