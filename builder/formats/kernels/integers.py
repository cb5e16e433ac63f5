"""INT8 weights with a scale for each output: scales and codes, with the arithmetic of `formats/arithmetic/int8.py`.

Arguments are those of `packing`.
"""

from __future__ import annotations

import numpy as np

from builder.formats.kernels import packing
from builder.formats.kernels.arrays import Array

HALF_RANGE = 127.5
# The difference between 1 and the next number: what a scale of zero becomes.
EPSILON = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}


def scales_of(values: Array, dtype: str, *, rounded_to: str, threads: int | None = None, kind: str = "F32") -> Array:
    """A float32 scale for each row, rounded to a number that the type `kind` has."""
    found = packing.largest_rows(values, dtype, rounded_to=rounded_to, threads=threads) / np.float32(HALF_RANGE)
    found = _rounded(found, kind)
    return np.where(found == 0, np.float32(EPSILON[kind]), found)


def pack(
    values: Array, dtype: str, scales: Array, rounded_to: str, threads: int | None = None, *, unsigned: bool = False
) -> Array:
    """The codes, as uint8; 128 is added to each where they are `unsigned`."""
    return packing.pack_int8(values, dtype, scales, rounded_to=rounded_to, threads=threads, unsigned=unsigned)


def _rounded(scales: Array, kind: str) -> Array:
    """Positive float32 numbers as the nearest ones of a type, ties to even."""
    if kind == "F16":
        return scales.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        bits = scales.view(np.uint32)
        return (bits + 0x7FFF + ((bits >> 16) & 1) & np.uint32(0xFFFF0000)).view(np.float32)
    return scales
