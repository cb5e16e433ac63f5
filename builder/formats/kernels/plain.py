"""The same as the C extension, computed by torch with `formats/arithmetic`: slower, the same bytes. Imports torch.

In steps of whole rows, so that a step's copies need a few megabytes. torch has threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from builder.formats.arithmetic import fp8, int8, nvfp4, nvfp4_search
from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.kernels.arrays import Array, Weights

_STEP = 1 << 21  # elements


def largest_rows(weights: Weights, threads: int) -> Array:
    """The largest magnitude of each row, float32."""
    values = weights.bits
    found = np.empty(len(values), np.float32)
    for rows in _steps(values):
        largest = torch.zeros(len(values[rows]))
        for start in range(0, values.shape[1], _STEP):
            part = _tensor(weights, rows, slice(start, start + _STEP))
            largest = torch.maximum(largest, part.abs().amax(-1).float())  # NaN wins
        found[rows] = largest.numpy()
    return found


def pack_nvfp4(weights: Weights, scale: float, codes: Array, scales: Array, threads: int, *, searched: bool) -> None:
    """Fills `codes` and `scales`."""
    whole, pack = torch.tensor(scale), nvfp4_search.quantize if searched else nvfp4.quantize
    for rows in _steps(weights.bits):
        packed, blocks, _ = pack(_tensor(weights, rows), whole)
        codes[rows], scales[rows] = packed.numpy(), blocks.view(torch.uint8).numpy()


def pack_fp8(weights: Weights, scales: Array, codes: Array, threads: int) -> None:
    """Fills `codes`."""
    for rows in _steps(weights.bits):
        codes[rows] = fp8.quantize(_tensor(weights, rows), _column(scales, rows)).view(torch.uint8).numpy()


def pack_int8(weights: Weights, scales: Array, sign: int, codes: Array, threads: int) -> None:
    """Fills `codes`."""
    for rows in _steps(weights.bits):
        made = int8.codes(_tensor(weights, rows), _column(scales[rows], slice(None)))
        codes[rows] = made.view(torch.uint8).numpy() ^ np.uint8(sign)


def unpack_nvfp4(codes: Array, scales: Array, scale: float, dtype: str, values: Array, threads: int) -> None:
    """Fills `values`."""
    for rows in _steps(codes):
        blocks = torch.tensor(scales[rows]).view(torch.float8_e4m3fn)
        found = nvfp4.dequantize(torch.tensor(codes[rows]), blocks, torch.tensor(scale), DTYPES[dtype])
        values[rows] = _bits(found, values)


def unpack_fp8(codes: Array, scales: Array, dtype: str, values: Array, threads: int) -> None:
    """Fills `values`."""
    for rows in _steps(codes):
        weight = torch.tensor(codes[rows]).view(torch.float8_e4m3fn)
        values[rows] = _bits(fp8.dequantize(weight, _column(scales, rows), DTYPES[dtype]), values)


def _steps(matrix: Array) -> Iterator[slice]:
    """Whole rows of about _STEP elements."""
    step = max(1, _STEP // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _tensor(weights: Weights, rows: slice, columns: slice = slice(None)) -> Tensor:
    """A copy as a tensor: torch warns of arrays that it may not write to."""
    part = np.array(weights.bits[rows, columns])
    tensor = torch.from_numpy(part.view({2: np.int16, 4: np.int32}[part.itemsize])).view(DTYPES[weights.dtype])
    return tensor if weights.rounded_to is None else tensor.to(DTYPES[weights.rounded_to])


def _column(scales: Array, rows: slice) -> Tensor:
    return torch.tensor(scales if len(scales) == 1 else scales[rows])[:, None]


def _bits(tensor: Tensor, like: Array) -> Array:
    found: Array = tensor.view({2: torch.int16, 4: torch.int32}[like.itemsize]).numpy().view(like.dtype)
    return found
