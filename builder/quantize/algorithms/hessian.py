"""`hessian`: the block scale and the codes with the least error of the layer's outputs. Imports torch.

The error of a block's weights counts as e^T H e, with the second moments H of its 16 inputs, as ModelOpt's local
Hessian has it (0.47, quantization/model_calib.py, local_hessian_calibrate), which rounds to nearest. Here the codes
descend from there, one weight at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from builder.formats.arithmetic import nvfp4
from builder.quantize.algorithms import block_scales

# Codes as they are stored, and scales: of NVFP4 packed uint8 [rows, inputs / 2] and E4M3 [rows, inputs / 16].
Rounded = tuple[Tensor, Tensor]

SWEEPS = 2  # over the 16 weights of a block


def round_rows(weight: Tensor, hessians: Tensor, global_scale: Tensor) -> Rounded:
    """Rounds float32 rows [rows, inputs]. hessians: [inputs / 16, 16, 16].

    Columns whose inputs are always zero count with the mean of the diagonal: otherwise no error of theirs would, and
    the smallest scale would be taken, which clips them.
    """
    diagonals = hessians.diagonal(dim1=1, dim2=2)
    mean = diagonals.mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessians = hessians + torch.diag_embed(torch.where(diagonals == 0, mean, 0))
    columns = weight.T.contiguous()
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(hessians), len(weight), dtype=torch.float8_e4m3fn, device=weight.device)
    for number, hessian in enumerate(hessians):
        block = slice(number * nvfp4.BLOCK, (number + 1) * nvfp4.BLOCK)
        scales[number] = block_scales.by_error(columns[block], global_scale, hessian)
        codes[block] = _codes(columns[block], scales[number].float() * global_scale, hessian)
    return nvfp4.pack(codes.T.contiguous()), scales.T.contiguous()


def _codes(columns: Tensor, step: Tensor, hessian: Tensor) -> Tensor:
    """Codes of columns [16, rows]: rounded to nearest, then each to where the errors of the other 15 want it.

    e^T H e of a row is least in weight j at w_j + (sum over k != j of H_jk e_k) / H_jj, e = w - q, and its nearest
    number is the best of the grid. No step raises the error.
    """
    ratios = columns / step
    errors = columns - block_scales.rounded(ratios) * step
    for _ in range(SWEEPS):
        for number, row in enumerate(hessian):
            wanted = columns[number] + (row @ errors) / row[number] - errors[number]
            torch.div(wanted, step, out=ratios[number])
            torch.sub(columns[number], block_scales.rounded(ratios[number]) * step, out=errors[number])
    return nvfp4.encode(ratios)
