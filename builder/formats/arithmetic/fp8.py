"""FP8 E4M3 for linear layers, with a scale for a tensor or for each of its rows, and for the KV cache. Imports torch.

value = E4M3 * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
_ZERO = 2.0**-24  # a row whose largest value is not above it becomes zero


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The E4M3 weight of an FP8 layer and its scale, or one for each row [rows, 1] -> values in `dtype`."""
    return (weight.float() * _factors(scale)[1]).to(dtype)


def quantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The E4M3 codes of a weight [rows, n] under its scale, or one for each row [rows, 1], saturated at 448.

    By division, as ModelOpt's TensorRT-LLM exporter rounds it (export/quant_utils.py, to_quantized_weight). A row of
    zeros stays one.
    """
    divided = weight.float() / torch.where(scale > 0, scale, 1.0)
    return divided.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [rows, n] through E4M3 under its scale, or one for each row [rows, 1], and back, in float32."""
    return quantize(weight, scale).float() * _factors(scale)[1]


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """The input of an FP8 layer through E4M3 under its calibrated input_scale and back, in x's dtype."""
    up, down = _factors(scale)
    return ((x.float() * up).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * down).to(x.dtype)


def fake_quantize_rows(x: Tensor) -> Tensor:
    """Each row of x [..., n] through E4M3 under a scale of its own and back, in x's dtype.

    As ModelOpt's simulation rounds them (quantization/tensor_quant.py, fp8_eager, 0.37 to 0.47).
    """
    largest = x.abs().amax(-1, keepdim=True).float()
    up = E4M3_MAX / torch.where(largest <= _ZERO, 1.0, largest)
    return ((x.float() * up).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * (1 / up)).to(x.dtype)


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
