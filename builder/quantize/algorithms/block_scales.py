"""The E4M3 scales of 16 columns of a weight, for all rows at once: by the largest magnitude, or by search.

The search tries the E4M3 numbers around the scale of the `max` rule, from 4 below it to 8 above (about 0.65 to 2 times
the scale, there are 8 in an octave), and takes the one with the least error e^T H e of the block, e being what rounding
to nearest leaves. On the bundled model a window twice as wide changes no figure (KL to BF16 .0242 / .0303 with both).
ModelOpt 0.47 tries all 126 numbers (calib/mse.py, NVFP4MSECalibrator). Imports torch.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from builder.formats.arithmetic import nvfp4

BELOW, ABOVE = 4, 8
LARGEST_CODE = 126  # 448; 127 is NaN
_EXPONENT = 0x7F800000  # its bits in a float32


def by_largest(columns: Tensor, global_scale: Tensor) -> Tensor:
    """Scales (E4M3) [rows] of columns [16, rows] as `nvfp4.block_scales` gives them."""
    scale = columns.abs().amax(0) / (nvfp4.E2M1_MAX * global_scale)
    scale[scale == 0] = 1.0
    return scale.clamp(nvfp4.E4M3_TINY, nvfp4.E4M3_MAX).to(torch.float8_e4m3fn)


def by_error(columns: Tensor, global_scale: Tensor, hessian: Tensor | None) -> Tensor:
    """Scales (E4M3) [rows] of columns [16, rows] with the least e^T H e; of equal ones the smallest.

    hessian: [16, 16]; None for the sum of squares. Rows of zeros keep the scale of `by_largest`.
    """
    first = by_largest(columns, global_scale).view(torch.uint8).int()
    best, chosen = torch.full_like(columns[0], torch.inf), first.clone()
    for step in range(-BELOW, ABOVE + 1):
        codes = (first + step).clamp_(1, LARGEST_CODE)
        scales = values(codes) * global_scale
        errors = rounded(columns / scales).mul_(scales).sub_(columns)
        weighted = errors if hessian is None else hessian @ errors
        error = (weighted * errors).sum(0)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, codes, chosen)
    chosen = torch.where(columns.abs().amax(0) > 0, chosen, first)
    return chosen.to(torch.uint8).view(torch.float8_e4m3fn)


def rounded(ratios: Tensor) -> Tensor:
    """The E2M1 numbers nearest to float32 ratios, ties to even, saturated at 6. See nvfp4._round_blocks."""
    apart = (ratios.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(1, 4).mul_(0.5)
    return ratios.div(apart).round_().mul_(apart).clamp_(-nvfp4.E2M1_MAX, nvfp4.E2M1_MAX)


def values(codes: Tensor) -> Tensor:
    """The float32 values of E4M3 codes (integers)."""
    return _table(codes.device)[codes]


@cache
def _table(device: torch.device) -> Tensor:
    return torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
