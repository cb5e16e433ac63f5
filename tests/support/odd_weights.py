"""Weights as raw bits, with everything that a number format can meet."""

from __future__ import annotations

import math

import numpy as np
import torch

from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.kernels.arrays import Array


def raw(tensor: torch.Tensor) -> Array:
    """A tensor's bits."""
    size = tensor.element_size()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    return tensor.contiguous().view(kind).numpy().view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])


def tensor(values: Array, dtype: str, rounded_to: str | None = None) -> torch.Tensor:
    """The bits as torch sees them."""
    found = torch.from_numpy(values.view({2: np.int16, 4: np.int32}[values.itemsize])).view(DTYPES[dtype])
    return found if rounded_to in (None, "F32") else found.to(DTYPES[rounded_to])


def odd(seed: int, rows: int, blocks: int, dtype: str) -> Array:
    """Random blocks of random sizes; some zero, subnormal, huge, Inf or NaN, some with ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks, 16, generator=generator)
    x *= torch.exp(3 * torch.randn(rows, blocks, 1, generator=generator))
    chosen = torch.rand(rows, blocks, generator=generator)
    for number, factor in enumerate((0.0, -0.0, 1e-40, 1e-44, 1e35, math.inf, math.nan)):
        x[(chosen >= number / 20) & (chosen < (number + 1) / 20)] *= factor
    tie = torch.rand(x.shape, generator=generator) < 0.3
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[tie] = (ties[torch.randint(8, x.shape, generator=generator)] * torch.sign(x))[tie]
    return raw(x.flatten(1).to(DTYPES[dtype]))
