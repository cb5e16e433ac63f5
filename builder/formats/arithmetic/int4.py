"""INT4 in blocks of inputs with one scale each, two outputs in a byte. Imports torch.

value = INT4 * scale, with INT4 from -8 to 7 in two's complement. A byte holds the weights of an even output (low
nibble) and of the next one (high) for the same input (ModelOpt, export/quant_utils.py, pack_int4_in_uint8).
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MAX, INT4_MIN = 7.0, -8.0


def quantize(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [outputs, inputs] under scales [outputs, blocks] -> INT8 codes from -8 to 7, as ModelOpt rounds it."""
    block = weight.shape[-1] // scale.shape[-1]
    return (weight / scale.repeat_interleave(block, dim=-1)).round().clamp(INT4_MIN, INT4_MAX).to(torch.int8)


def pack(codes: Tensor) -> Tensor:
    """INT8 codes [outputs, inputs] -> bytes [outputs / 2, inputs]. ValueError for an odd number of outputs."""
    if codes.shape[0] % 2:
        raise ValueError(f"pack needs an even number of outputs, got {codes.shape[0]}")
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes [outputs / 2, inputs], U8 or I8 -> INT8 codes [outputs, inputs]."""
    raw = packed.view(torch.uint8)
    nibbles = torch.stack((raw & 15, raw >> 4), dim=1).flatten(0, 1)
    return (nibbles ^ 8).view(torch.int8) - 8  # extends the sign


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [outputs / 2, inputs] and scales [outputs, blocks] -> values [outputs, inputs] in `dtype`.

    ValueError if the scales are not those of the weight.
    """
    outputs, inputs = packed.shape[0] * 2, packed.shape[1]
    if scale.shape[0] != outputs or inputs % scale.shape[1]:
        raise ValueError(f"packed {tuple(packed.shape)} and scales {tuple(scale.shape)} do not match")
    blocks = unpack(packed).view(outputs, scale.shape[1], -1)
    return (blocks * scale.float()[..., None]).view(outputs, inputs).to(dtype)


def fake_quantize(blocks: Tensor, amax: Tensor) -> Tensor:
    """[blocks, size] with the largest magnitudes [blocks, 1] through INT4 and back, in float32: as ModelOpt's search
    simulates it (quantization/tensor_quant.py, _tensor_quant, 0.37 to 0.47). A block of zeros stays zero."""
    up = torch.where(amax > 0, INT4_MAX / amax.float(), 1.0)
    return (blocks.float() * up).round_().clamp_(INT4_MIN, INT4_MAX) / up
