"""`gptq`: each column's rounding error is corrected in the columns that follow it. Imports torch.

Frantar et al., GPTQ, 2022 (arXiv 2210.17323), for the formats of grids.py. The scale of a block of NVFP4 is chosen from
its weights as the columns before it have corrected them, when it is reached: on the bundled model that leaves a KL 2 %
lower than scales of the original weights. With an order, whole blocks of 16 columns are moved, so scales stay those of
16 neighbouring columns and servers need no index. Float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from builder.formats.arithmetic.nvfp4 import BLOCK
from builder.quantize.algorithms.grids import Grid
from builder.quantize.algorithms.hessian import Rounded

RAISED = 10.0  # damping is multiplied by it until the Hessian can be factored
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Options:
    """scales: how scales are chosen, "max", "mse" or "hessian". damping: added to the Hessian's diagonal, as a
    share of its mean. order: "none", or "activation": blocks with the largest inputs first. block_size: columns after
    which all others are corrected, a multiple of 16."""

    scales: str
    damping: float
    order: str
    block_size: int

    @classmethod
    def of_job(cls, values: Mapping[str, Any]) -> Options:
        """Those of a recipe's `quantization.gptq`."""
        return cls(values["scales"], values["damping"], values["order"], values["block_size"])


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian.

    upper: the upper triangular factor U of its inverse, U^T U, columns in their order. metrics: its diagonal blocks
    [inputs / 16, 16, 16]. order: the columns' numbers, or None where they stay. damping: the share that was added.
    """

    upper: Tensor
    metrics: Tensor
    order: Tensor | None
    damping: float


def factor(hessian: Tensor, options: Options) -> Factor | None:
    """Factors a Hessian [inputs, inputs], which is changed. None if that fails with any damping.

    Holds 3 such matrices at most, if the caller keeps none, beside the workspace of the factorization.

    Columns whose inputs are always zero get the mean of the diagonal: they are rounded as they are.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    if not 0 < mean < float("inf"):
        return None
    diagonal[diagonal == 0] = mean
    order = _order(diagonal) if options.order == "activation" else None
    del diagonal  # a view of the matrix, which would keep it
    if order is not None:
        hessian = hessian[order][:, order]
    added, damping = 0.0, options.damping
    while True:
        hessian.diagonal().add_((damping - added) * mean)
        upper = _factor_of_inverse(hessian)
        if upper is not None:
            return Factor(upper, _diagonal_blocks(hessian), order, damping)
        if damping >= MOST_DAMPING:
            return None
        added, damping = damping, min(MOST_DAMPING, damping * RAISED)


def _factor_of_inverse(hessian: Tensor) -> Tensor | None:
    """The upper triangular U with U^T U = H^-1; None if H is not positive definite to float32.

    H = R R^T with an upper triangular R, a Cholesky factorization from the last column on, so U is R^-1: the inverse
    of the factor of the reversed matrix, reversed again. In place, as such matrices are large.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        return None
    inverse = torch.eye(len(lower), device=lower.device).T  # columns lie together, as LAPACK has them
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1) if bool(torch.isfinite(inverse.sum())) else None


def _order(diagonal: Tensor) -> Tensor:
    """The columns' numbers, blocks of 16 with the largest inputs first."""
    blocks = diagonal.view(-1, BLOCK).sum(1).argsort(descending=True, stable=True)
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten()


def _diagonal_blocks(hessian: Tensor) -> Tensor:
    parts = hessian.view(len(hessian) // BLOCK, BLOCK, -1, BLOCK)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def round_rows(weight: Tensor, factored: Factor, grid: Grid, options: Options) -> Rounded:
    """Rounds float32 rows [rows, inputs], which do not depend on each other. Returns what is stored of them."""
    columns = weight.T.contiguous() if factored.order is None else weight.T[factored.order]
    codes = torch.empty(columns.shape, dtype=grid.code, device=weight.device)
    upper, metrics, rule = factored.upper, factored.metrics, options.scales
    scales = grid.first_scales(columns, metrics, rule)
    for start in range(0, len(columns), options.block_size):
        end = min(start + options.block_size, len(columns))
        errors = torch.empty_like(columns[start:end])
        for begin in range(start, end, BLOCK):
            block, after, number = slice(begin, begin + BLOCK), slice(begin + BLOCK, end), begin // BLOCK
            step = grid.step(scales, number, columns[block], metrics[number], rule)
            found = errors[begin - start : begin - start + BLOCK]
            codes[block] = _round_block(columns[block], step, upper[block, block], found, grid)
            columns[after] -= upper[block, after].T @ found
        columns[end:] -= upper[start:end, end:].T @ errors
    if factored.order is not None:
        codes[factored.order] = codes.clone()
    return grid.stored(codes.T.contiguous(), scales, factored.order)


def _round_block(columns: Tensor, step: Tensor, upper: Tensor, errors: Tensor, grid: Grid) -> Tensor:
    """Codes [16, rows] of a block's columns, each corrected by the errors of those before it.

    step: the value of 1.0 in each row. upper: the block's part of the factor. Fills `errors` with each column's error
    over its diagonal element.
    """
    ratios = torch.empty_like(columns)
    for column in range(BLOCK):
        torch.div(columns[column], step, out=ratios[column])
        torch.sub(columns[column], grid.rounded(ratios[column]) * step, out=errors[column])
        errors[column] /= upper[column, column]
        if column + 1 < BLOCK:
            columns[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
    return grid.encoded(ratios)
