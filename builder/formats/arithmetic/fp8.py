"""FP8 E4M3 for layers with one scale for the weight and one for the input, and for the KV cache. Imports torch.

value = E4M3 * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The E4M3 weight of an FP8 layer and its scale -> values in `dtype`."""
    return (weight.float() * _factors(scale)[1]).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """The input of an FP8 layer through E4M3 under its calibrated input_scale and back, in x's dtype."""
    up, down = _factors(scale)
    return ((x.float() * up).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * down).to(x.dtype)


def _factors(scale: Tensor) -> tuple[Tensor, Tensor]:
    """448 / amax and its reciprocal, which is the scale but for its last bit: as ModelOpt's simulation computes them
    (quantization/tensor_quant.py, fp8_eager, 0.47.0), so that it and a checkpoint round alike."""
    up = E4M3_MAX / (scale.float() * E4M3_MAX)
    return up, 1 / up


def round_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x through FP8 E4M3 and back, in x's dtype, as a KV cache does it: times 1/scale, saturated, rounded, times scale.

    TensorRT-LLM multiplies by the reciprocal when it writes the cache and by the scale when it reads it.
    """
    scaled = (x.float() * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX)
    return (scaled.to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
