"""Dequantizes torch tensors: in C on the CPU where that is built, else with `formats/arithmetic`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from builder.formats.arithmetic import fp8, nvfp4
from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.kernels import packing
from builder.formats.kernels.arrays import Array

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def dequantize_nvfp4(packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [outputs, inputs / 2], E4M3 scales [outputs, inputs / 16] and global scale [] -> values in `dtype`.

    ValueError if the shapes do not match.
    """
    if not _in_c(packed, dtype):
        return nvfp4.dequantize(packed, block_scale, global_scale, dtype)
    found = packing.unpack_nvfp4(_bytes(packed), _bytes(block_scale), float(global_scale), _NAMES[dtype])
    return _tensor(found, dtype)


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An E4M3 weight [outputs, inputs] and its scale, or one for each output [outputs, 1] -> values in `dtype`."""
    if not _in_c(weight, dtype):
        return fp8.dequantize(weight, scale, dtype)
    scales = scale.float().reshape(-1).numpy()
    return _tensor(packing.unpack_fp8(_bytes(weight), scales, _NAMES[dtype]), dtype)


def _in_c(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.device.type == "cpu" and weight.dim() == 2 and dtype in _NAMES and packing.path() != "torch"


def _bytes(tensor: Tensor) -> Array:
    found: Array = tensor.detach().contiguous().view(torch.uint8).numpy()
    return found


def _tensor(values: Array, dtype: torch.dtype) -> Tensor:
    signed = {2: "<i2", 4: "<i4"}[values.itemsize]
    return torch.from_numpy(values.view(signed)).view(DTYPES[_NAMES[dtype]])
