"""Which models an FP8 KV cache can ruin, judged by config.json alone. Pure.

Qwen2 and Qwen2.5 add a bias to keys and values, which holds large constants, and have no norm on keys that would take
them away; one scale for the whole cache then leaves few bits for the rest. Reports of answers that turn to nonsense:
NVIDIA/TensorRT-LLM #4218, QwenLM/Qwen3 #840, verl-project/verl #4435 (which compares it with Qwen3's QK norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# They have the bias whatever config.json says (transformers 5.14, models/qwen2/modeling_qwen2.py: bias=True).
BIASED = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")
# Families that norm queries and keys, by the beginning of their names.
NORMED = ("qwen3", "gemma3", "gemma4", "olmo2", "olmo3", "exaone4")


def warning(config: Mapping[str, Any], kv_cache_dtype: str) -> str | None:
    """What to know before an FP8 cache, or None where there is none or nothing speaks against it."""
    kind = str(config.get("model_type", ""))
    biased = kind in BIASED or bool(config.get("attention_bias"))
    normed = kind.startswith(NORMED) or bool(config.get("use_qk_norm") or config.get("qk_layernorm"))
    if kv_cache_dtype != "fp8" or not biased or normed:
        return None
    return (
        f"{kind or 'this model'} has an attention bias and no QK norm: an FP8 KV cache can ruin it (TensorRT-LLM "
        "#4218, QwenLM/Qwen3 #840). Compare first: builder eval --compare-kv; or take --kv-cache-dtype auto"
    )
