"""ModelOpt's fake quantizers without CUDA: the same arithmetic, eager, from `builder.formats.arithmetic.nvfp4`.

ModelOpt has kernels for CUDA only, so a forward of an NVFP4-simulated model fails on a CPU with "amax must be a CUDA
tensor for dynamic block quantization". Imports torch and ModelOpt: for worker processes and tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from builder.formats.arithmetic import fp8, nvfp4


def enable_cpu_simulation() -> None:
    """Makes ModelOpt (0.37 to 0.47) simulate NVFP4 with our arithmetic, from now on, in this process."""
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    tensor_quant.dynamic_block_quantize_op = _dynamic_block
    if hasattr(tensor_quantizer, "static_blockwise_fp4_fake_quant"):  # not in 0.37
        tensor_quantizer.static_blockwise_fp4_fake_quant = _static_block


def _dynamic_block(
    inputs: Tensor,
    block_size: int,
    amax: Tensor,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> Tensor:
    """Replaces tensor_quant.dynamic_block_quantize_op, for NVFP4 only (E2M1, E4M3 scales, blocks of 16)."""
    asked = (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits, block_size)
    if asked != (4, 2, 8, 4, nvfp4.BLOCK):
        raise NotImplementedError(f"only NVFP4 is simulated on a CPU, not (bits, exponent, ..., block) = {asked}")
    return nvfp4.fake_quantize(inputs, nvfp4.scale_of(amax.amax()))


def _static_block(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = nvfp4.E4M3_MAX,
    out_dtype: torch.dtype | None = None,
    *_: Any,
) -> Tensor:
    """Replaces static_blockwise_fp4_fake_quant: block scales from given amaxes (gemm/fp4_kernel.py, 0.47.0)."""
    scale = amax.float() / nvfp4.E2M1_MAX
    if quantize_block_scales:
        whole = (global_amax if global_amax is not None else amax.amax()).float()
        whole = whole * (nvfp4.E4M3_MAX / fp8_max_for_normalization) / nvfp4.E2M1_MAX
        scale = fp8.round_e4m3(scale, whole / nvfp4.E4M3_MAX)
    blocks = x.reshape(amax.numel(), -1)
    return nvfp4.fake_quantize_static(blocks, scale.reshape(-1, 1)).view(x.shape).to(out_dtype or x.dtype)
