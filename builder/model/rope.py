"""Rotary position embedding by a TensorRT-LLM config.json: unscaled, or with linear, llama3 or yarn scaling.

The formulas are those of transformers (modeling_rope_utils.py, 4.57 and 5); TensorRT-LLM's are the same (functional.py,
RopeEmbeddingUtils). Imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from builder.core.errors import UnsupportedError


def frequencies(head_size: int, base: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """Angles per position, [head_size / 2] float32, and the factor that multiplies sine and cosine (1 except for yarn).

    base, scaling: rotary_base and rotary_scaling of config.json. UnsupportedError for another kind of scaling.
    """
    inverse = 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    if kind == "yarn":
        return _yarn(inverse, base, scaling)
    raise UnsupportedError(f"Rotary scaling {kind!r} is not computed here.", why="It supports linear, llama3 and yarn.")


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Divides low frequencies by the factor, keeps high ones and interpolates between them."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    mixed: Tensor = inverse / scaling["factor"] * (1 - kept) + inverse * kept
    return mixed


def _yarn(inverse: Tensor, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071), equations 19 to 23, with the correction range truncated to whole dimensions."""
    factor, size = scaling["factor"], 2 * inverse.numel()
    original = scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return inverse / factor * (1 - kept) + inverse * kept, _attention_factor(factor, scaling)


def _attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    """YaRN's factor on sine and cosine, which scales the attention logits by its square."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, over, under = (scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return mscale(over) / mscale(under) if over and under else mscale(1.0)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates x [heads, tokens, size] by angles whose cosine and sine are [tokens, size]. Pairs are (i, i + size / 2),
    as in GPT-NeoX."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
