"""What GPTQ rounds to: the numbers of a format, and the scales that they are multiplied by. Imports torch.

Columns are those of a transposed weight, [inputs, rows], in the order in which they are rounded, and each row has its
own scales: NVFP4 one for each block of 16 columns, chosen when the block is reached, INT8 a single one, chosen before
any column is rounded.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from builder.formats.arithmetic import int8, nvfp4
from builder.formats.arithmetic.nvfp4 import BLOCK
from builder.formats.int8_dynamic import Int8
from builder.quantize.algorithms import block_scales
from builder.quantize.algorithms.hessian import Rounded

# Largest magnitudes that a search of INT8 scales tries, as shares of the row's: llm-compressor's MSE observer also goes
# from 1 down to 0.8 by hundredths (0.12, observers/mse.py: maxshrink, grid). It stops after five without a gain and
# takes the 2.4th power of errors; here all are tried, and errors are squared, or weighted by the moments.
SHRUNK = tuple(1 - step / 100 for step in range(21))


class Grid(Protocol):
    """A number format, as GPTQ uses it."""

    @property
    def code(self) -> torch.dtype:
        """Of the codes."""

    def first_scales(self, columns: Tensor, metrics: Tensor, rule: str) -> Tensor:
        """The scales that are chosen before any column is rounded, or an empty tensor for those of blocks.

        metrics: the diagonal blocks of the Hessian [inputs / 16, 16, 16]. rule: "max", "mse" or "hessian".
        """

    def step(self, scales: Tensor, number: int, columns: Tensor, metric: Tensor, rule: str) -> Tensor:
        """The value of 1.0 in each row of the block with this number. The block's own scales are chosen and stored."""

    def rounded(self, ratios: Tensor) -> Tensor:
        """The nearest numbers of the format."""

    def encoded(self, ratios: Tensor) -> Tensor:
        """Their codes."""

    def stored(self, codes: Tensor, scales: Tensor, order: Tensor | None) -> Rounded:
        """The tensors of a checkpoint. codes: [rows, inputs], in the model's order; scales: in that of rounding."""


class Nvfp4Blocks:
    """E2M1 under an E4M3 scale for each block, under a fixed global scale."""

    code = torch.uint8

    def __init__(self, global_scale: Tensor) -> None:
        self._global_scale = global_scale

    def first_scales(self, columns: Tensor, metrics: Tensor, rule: str) -> Tensor:
        return torch.empty(len(metrics), columns.shape[1], dtype=torch.float8_e4m3fn, device=columns.device)

    def step(self, scales: Tensor, number: int, columns: Tensor, metric: Tensor, rule: str) -> Tensor:
        if rule == "max":
            scales[number] = block_scales.by_largest(columns, self._global_scale)
        else:
            hessian = metric if rule == "hessian" else None
            scales[number] = block_scales.by_error(columns, self._global_scale, hessian)
        return scales[number].float() * self._global_scale

    def rounded(self, ratios: Tensor) -> Tensor:
        return block_scales.rounded(ratios)

    def encoded(self, ratios: Tensor) -> Tensor:
        return nvfp4.encode(ratios)

    def stored(self, codes: Tensor, scales: Tensor, order: Tensor | None) -> Rounded:
        if order is not None:
            scales.view(torch.uint8)[order[::BLOCK] // BLOCK] = scales.view(torch.uint8).clone()
        return nvfp4.pack(codes), scales.T.contiguous()


class Int8Rows:
    """INT8 under a scale for each row. kind: the model's own type."""

    code = torch.int8

    def __init__(self, number_format: Int8, kind: torch.dtype) -> None:
        self._format, self._kind = number_format, kind

    def first_scales(self, columns: Tensor, metrics: Tensor, rule: str) -> Tensor:
        """Of equally good scales the largest."""
        amax = columns.abs().amax(0)
        scales = self._format.scales_of(amax, self._kind)
        if rule == "max":
            return scales
        candidates = torch.stack([self._format.scales_of(amax * share, self._kind) for share in SHRUNK])
        errors = torch.zeros_like(candidates)
        for number, metric in enumerate(metrics):
            block = columns[number * BLOCK : (number + 1) * BLOCK]
            for candidate, error in zip(candidates, errors, strict=True):
                lost = self.rounded(block / candidate).mul_(candidate).sub_(block)
                error += ((metric @ lost if rule == "hessian" else lost) * lost).sum(0)
        return candidates.gather(0, errors.argmin(0, keepdim=True))[0]

    def step(self, scales: Tensor, number: int, columns: Tensor, metric: Tensor, rule: str) -> Tensor:
        return scales

    def rounded(self, ratios: Tensor) -> Tensor:
        return ratios.clamp(int8.INT8_MIN, int8.INT8_MAX).round_()

    def encoded(self, ratios: Tensor) -> Tensor:
        return self.rounded(ratios).to(torch.int8)

    def stored(self, codes: Tensor, scales: Tensor, order: Tensor | None) -> Rounded:
        return self._format.stored_codes(codes), scales
