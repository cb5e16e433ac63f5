"""INT8 with one scale for each output of the weight and one for the input. Imports torch.

value = INT8 * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX, INT8_MIN = 127.0, -128.0


def quantize(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [outputs, inputs] under its scales [outputs] -> INT8, as ModelOpt's exporters round it
    (export/quant_utils.py, to_quantized_weight, 0.37 to 0.47)."""
    return (weight / scale[:, None]).round().clamp(INT8_MIN, INT8_MAX).to(torch.int8)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The INT8 weight [outputs, inputs] and its scales [outputs] -> values in `dtype`."""
    return (weight.float() * scale.float()[:, None]).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x through INT8 under a scale that broadcasts to it and back, in x's dtype: as ModelOpt's simulation computes it
    (quantization/tensor_quant.py, _tensor_quant, 0.37 to 0.47)."""
    up = INT8_MAX / (scale.float() * INT8_MAX)
    return ((x.float() * up).round_().clamp_(INT8_MIN, INT8_MAX) / up).to(x.dtype)


# What follows is the arithmetic of compressed-tensors (0.18). A scale is the largest magnitude over 127.5, half of the
# 255 steps from -128 to 127 (quantization/utils/helpers.py, calculate_qparams), so the largest weight of an output is
# -128, or 127 by half a step too little.
HALF_RANGE = 127.5


def scales_of(amax: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """The scales for these largest magnitudes, rounded to `kind`, in float32. Zero, also after rounding, becomes the
    epsilon of `kind`, as there, so that nothing is divided by it."""
    scale = (amax.float() / HALF_RANGE).to(kind)
    return torch.where(scale == 0, torch.finfo(kind).eps, scale).float()


def codes(x: Tensor, scale: Tensor) -> Tensor:
    """x under a scale that broadcasts to it -> INT8, ties to even (quantization/lifecycle/forward_helpers.py)."""
    return (x.float() / scale).clamp_(INT8_MIN, INT8_MAX).round_().to(torch.int8)


def round_trip(x: Tensor, scale: Tensor) -> Tensor:
    """x through INT8 under a scale that broadcasts to it and back, in x's dtype."""
    return (x.float() / scale).clamp_(INT8_MIN, INT8_MAX).round_().mul_(scale).to(x.dtype)


def round_rows(x: Tensor) -> Tensor:
    """Each row of x [..., n] through INT8 under a scale of its own and back, in x's dtype."""
    return round_trip(x, scales_of(x.abs().amax(-1, keepdim=True)))


def pack(codes: Tensor) -> Tensor:
    """The inverse of `unpack`."""
    return (codes.contiguous().view(torch.uint8) ^ 128).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """I32 [outputs, inputs / 4], four codes plus 128 in each, the first in its lowest byte -> INT8 [outputs, inputs]
    (compressors/pack_quantized/helpers.py, pack_to_int32)."""
    return (packed.contiguous().view(torch.uint8) ^ 128).view(torch.int8)
