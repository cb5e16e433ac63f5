"""The NVFP4 number format: 4-bit E2M1 values in blocks of 16, an E4M3 scale per block, one FP32 scale per tensor.

    value = E2M1[code] * (float32(block_scale) * global_scale)

Arithmetic, step by step, as in ModelOpt 0.47.0 (modelopt/torch/quantization/qtensor/nvfp4_tensor.py), so that the
bytes are the same; its fake quantizer is followed for activations (`fake_quantize`). Imports torch: stages only.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # the smallest E4M3 number above zero
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # a code's lower 3 bits; bit 3 is the sign

# Elements per step: bounds the float32 temporaries (about 20 bytes per element) to some 80 MB.
_STEP = 1 << 22
# Below this block scale ModelOpt's kernels use 1.0, so the block becomes zero (gemm/fp4_kernel_hopper.py, 0.47.0;
# triton/fp4_kernel.py, 0.37.0). TensorRT-LLM's kernel (cvt_warp_fp16_to_fp4) knows no such limit, and it multiplies by
# approximate reciprocals: on a GPU a value beside a boundary may get the neighbouring code.
_KERNEL_TINY = 1e-5
_EXPONENT = 0x7F800000  # its bits in a float32


@cache
def _bounds(device: torch.device) -> Tensor:
    """Where codes change, for "how many bounds are below x".

    A tie goes to the even code: 0.25, 1.25, 2.5 and 5 down, 0.75, 1.75 and 3.5 up, hence the float before those three
    (common/nvfp4_quant.py:fp4_round_magnitude and gemm/tensor_quant_mx.h:round_to_even in ModelOpt 0.47.0).
    """
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    middle[1::2] = torch.nextafter(middle[1::2], torch.tensor(0.0))
    return middle.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] float32: the two values that a packed byte holds, the low nibble first."""
    values = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES))
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1).to(device)


def round_magnitude(x: Tensor) -> Tensor:
    """Codes 0..7 (int32) of the E2M1 values nearest to float32 x >= 0; ties to even, saturating at 6."""
    return torch.bucketize(x, _bounds(x.device), out_int32=True)


def encode(x: Tensor) -> Tensor:
    """Codes 0..15 (uint8) for float32 x. The sign bit is x < 0: a small negative gives 8 (-0), -0.0 gives 0."""
    return round_magnitude(x.abs()).to(torch.uint8) + (x < 0).to(torch.uint8) * 8


def pack(codes: Tensor) -> Tensor:
    """uint8 codes [..., K] -> bytes [..., K/2]; the odd element is in the high nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"pack needs an even number of codes, got {codes.shape[-1]}")
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def unpack(packed: Tensor) -> Tensor:
    """Bytes [..., K/2] -> uint8 codes [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def scale_of(amax: Tensor) -> Tensor:
    """The FP32 global scale (weight_scale_2, input_scale) of a tensor whose largest magnitude is `amax`."""
    return amax.float() / (E2M1_MAX * E4M3_MAX)


def block_scales(weight: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scales [..., K/16]: max|block| / (6 * global_scale), 1.0 for an all-zero block, never rounded to zero.

    ModelOpt 0.37.0 lacks the last clamp: there a scale under 2^-10 becomes 0, and its block dequantizes to 0.
    """
    scale = _blocks(weight).abs().amax(-1).float() / (E2M1_MAX * global_scale)
    scale[scale == 0] = 1.0
    return scale.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(weight: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [..., K] -> (packed uint8 [..., K/2], block scales E4M3 [..., K/16], global scale float32 []).

    Give `global_scale` where several tensors share one (q/k/v, gate/up). ValueError if K is not a multiple of 16, or if
    the global scale is not finite and positive (an all-zero weight, NaN): ModelOpt writes NaN scales there.
    """
    blocks = _blocks(weight)
    if global_scale is None:
        global_scale = scale_of(weight.abs().amax())
    if not bool(torch.isfinite(global_scale) & (global_scale > 0)):
        raise ValueError(f"no NVFP4 scale for this tensor: its global scale is {global_scale.item()}")
    rows = blocks.reshape(-1, BLOCK)
    scales, packed = [], []
    for part in _steps(rows):
        scale = block_scales(part, global_scale)
        scales.append(scale)
        packed.append(pack_under(part, scale, global_scale))
    lead = weight.shape[:-1]
    return torch.cat(packed).reshape(*lead, -1), torch.cat(scales).reshape(*lead, -1), global_scale


def pack_under(blocks: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """The packed codes uint8 [n, 8] of blocks [n, 16] under E4M3 scales [n, 1] and a global scale."""
    return pack(encode(blocks.float() / (scales.float() * global_scale)))


def dequantize(packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: bytes [..., K/2], scales [..., K/16], global scale [] -> values [..., K] in `dtype`."""
    *lead, half = packed.shape
    if half * 2 != block_scale.shape[-1] * BLOCK or tuple(lead) != tuple(block_scale.shape[:-1]):
        raise ValueError(f"packed {tuple(packed.shape)} and block scales {tuple(block_scale.shape)} do not match")
    out = torch.empty((*lead, half * 2), dtype=dtype, device=packed.device)
    parts = out.view(-1, BLOCK), packed.reshape(-1, BLOCK // 2), block_scale.reshape(-1, 1)
    for target, codes, scale in zip(*map(_steps, parts), strict=True):
        values = _pairs(packed.device).index_select(0, codes.flatten().int()).view(-1, BLOCK)
        target.copy_(values * (scale.float() * global_scale))
    return out


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """Dynamic block quantization: x [..., K] rounded to NVFP4 with block scales of its own, in x's dtype.

    `global_scale` is the calibrated input_scale. Follows ModelOpt's kernels (gemm/fp4_kernel_hopper.py and
    common/nvfp4_quant.py:fp8_quantize_scale, 0.47.0): unlike `block_scales` a scale may round to zero.
    """
    blocks = _blocks(x).float()
    safe = torch.where(global_scale > 0, global_scale, 1e-12)
    scale = (blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * safe)).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float() * safe
    return _round_blocks(blocks, torch.where(scale >= _KERNEL_TINY, scale, 1.0)).view(x.shape).to(x.dtype)


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """x [blocks, size] rounded to E2M1 with given float32 scales [blocks, 1]; a zero scale gives a zero block.

    ModelOpt 0.47.0, common/nvfp4_quant.py:nvfp4_scalar_quant.
    """
    safe = torch.where((scale == 0) | ~torch.isfinite(scale), 1.0, scale)
    return torch.where(scale == 0, 0.0, _round_blocks(x.float(), safe)).to(x.dtype)


def _blocks(x: Tensor) -> Tensor:
    """View [..., K] as [..., K/16, 16]."""
    if x.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs a last dimension that is a multiple of {BLOCK}, got {x.shape[-1]}")
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _steps(blocks: Tensor) -> tuple[Tensor, ...]:
    """Views of so many blocks that a step over each needs little memory."""
    return torch.split(blocks, _STEP // BLOCK)


def _round_blocks(blocks: Tensor, scale: Tensor) -> Tensor:
    """Each float32 value to the nearest E2M1 multiple of its block's scale, ties to even. NaN stays.

    With one bit of mantissa, E2M1's values are half a power of two apart: that of the value itself, which its exponent
    bits are, within 1 and 4. A table of `round_magnitude`'s codes gives the same and takes nine times as long.
    """
    values = blocks / scale
    apart = (values.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(1, 4).mul_(0.5)
    return values.div_(apart).round_().mul_(apart).clamp_(-E2M1_MAX, E2M1_MAX).mul_(scale)
