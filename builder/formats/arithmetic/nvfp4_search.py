"""The E4M3 scale of each NVFP4 block by search: the one that leaves the least error. Imports torch: stages only.

As ModelOpt's sweep (0.47.0, quantization/calib/mse.py, NVFP4MSECalibrator): of all 126 positive E4M3 numbers, under the
global scale of the `max` rule, the one with the least sum of squared errors, and of equal ones the smallest. All is in
units of the global scale, so that a scale is an E4M3 number, its multiples are exact, and nothing overflows.

Without Hessians only some 11 scales of a block are tried, from large to small, because no other can win:
- Scales from largest / 3.5 on, if their half is an E4M3 number (code 16 and above). Their codes are at most 3, as the
  largest magnitude is at most 3.5 scales. The half scale has all these values and more, so its error is no larger, and
  the smaller of equals wins.
- Scales so small that clipping the largest magnitude alone costs more than the best so far. Smaller ones clip more, and
  a sum of floats that are not negative is no smaller than each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from builder.formats.arithmetic import nvfp4

LARGEST_CODE = 126  # 448; 127 is NaN
_FIRST_HALVED = 16  # from this code on, half of an E4M3 number is one
_STEP = 1 << 17  # blocks at a time: 8 MB for each temporary


def search(blocks: Tensor, global_scale: Tensor, hessians: Tensor | None = None) -> Tensor:
    """E4M3 scales [n] of blocks [n, 16] under a float32 global scale [].

    hessians: [m, 16, 16], of the inputs of m blocks, repeated for each row of a weight (n = rows x m); a block's error
    e counts as e^T H e. None: as the sum of its squares. A block of zeros gets the smallest scale; one with NaN or Inf
    the largest, as `block_scales` gives it.
    """
    found = [_codes(part, global_scale) for part in _steps(blocks)] if hessians is None else []
    if hessians is not None:
        rows = blocks.view(-1, len(hessians), nvfp4.BLOCK)
        found = [_weighted(part, global_scale, hessians) for part in _steps(rows, len(hessians))]
    return torch.cat(found).to(torch.uint8).view(torch.float8_e4m3fn)


def quantize(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `nvfp4.quantize`, with searched block scales: weight [..., K] -> (packed uint8 [..., K/2], block scales E4M3
    [..., K/16], global scale)."""
    blocks, lead = weight.reshape(-1, nvfp4.BLOCK), weight.shape[:-1]
    scales = search(blocks, global_scale)
    packed = [
        nvfp4.pack_under(*parts, global_scale) for parts in zip(_steps(blocks), _steps(scales[:, None]), strict=True)
    ]
    return torch.cat(packed).reshape(*lead, -1), scales.reshape(*lead, -1), global_scale


def _codes(blocks: Tensor, global_scale: Tensor) -> Tensor:
    """Codes (int64) of the scales with the least squared error."""
    sizes = blocks.float().abs() / global_scale
    largest = sizes.amax(-1)
    first = _first(largest)
    best, chosen = torch.full_like(largest, torch.inf), first.clone()
    rest = torch.arange(len(sizes), device=sizes.device)
    for step in range(LARGEST_CODE):
        codes = first[rest] - step
        scales = _scales(codes)
        clipped = largest[rest] - nvfp4.E2M1_MAX * scales
        kept = (codes > 0) & ~((clipped > 0) & (clipped * clipped > best[rest]))
        rest, codes, scales = rest[kept], codes[kept], scales[kept]
        if not len(rest):
            break
        error = _squared(_errors(sizes[rest], scales))
        better = (error <= best[rest]) & (error < torch.inf)
        best[rest[better]], chosen[rest[better]] = error[better], codes[better]
    return chosen


def _weighted(rows: Tensor, global_scale: Tensor, hessians: Tensor) -> Tensor:
    """Codes (int64) [rows * m] of the scales with the least e^T H e, for blocks [rows, m, 16]."""
    values = rows.float() / global_scale
    sizes = values.abs()
    best = torch.full(rows.shape[:-1], torch.inf, device=rows.device)
    chosen = _first(sizes.amax(-1))
    for code in range(LARGEST_CODE, 0, -1):
        scale = _scales(torch.tensor(code, device=rows.device))
        errors = (_errors(sizes, scale) * values.sign()).transpose(0, 1)  # [m, rows, 16]
        error = ((errors @ hessians) * errors).sum(-1).transpose(0, 1)
        better = (error <= best) & (error < torch.inf)
        best, chosen = torch.where(better, error, best), torch.where(better, code, chosen)
    return chosen.flatten()


def _first(largest: Tensor) -> Tensor:
    """Codes (int64) of the largest scales that can win under squared errors, for blocks with these largest
    magnitudes."""
    nearest = (largest / 3.5).clamp(max=nvfp4.E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).long()
    return nearest.clamp(_FIRST_HALVED - 1, LARGEST_CODE)  # NaN is 127


def _scales(codes: Tensor) -> Tensor:
    return codes.clamp(min=0).to(torch.uint8).view(torch.float8_e4m3fn).float()


def _errors(sizes: Tensor, scales: Tensor) -> Tensor:
    """Magnitudes [..., 16] less their nearest E2M1 multiples of the scales [...]."""
    times = sizes * (1.0 / scales)[..., None]
    apart = (times.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1, 4).mul_(0.5)
    near = times.div_(apart).round_().mul_(apart)
    return sizes - torch.where(near < nvfp4.E2M1_MAX, near, nvfp4.E2M1_MAX) * scales[..., None]


def _squared(errors: Tensor) -> Tensor:
    """The sum of squares [n] of [n, 16], added from left to right, as the C extension does."""
    total = errors[:, 0] * errors[:, 0]
    for column in errors[:, 1:].unbind(-1):
        total = total + column * column
    return total


def _steps(blocks: Tensor, each: int = 1) -> tuple[Tensor, ...]:
    return torch.split(blocks, max(1, _STEP // each))
