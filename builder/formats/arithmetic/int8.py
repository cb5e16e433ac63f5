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
