"""Weights as raw bits -> NVFP4 and FP8 codes with their scales, and back. Bytes equal those of `formats/arithmetic`.

Arrays are C-contiguous, on the CPU. `values` holds raw bits: [rows, inputs] of any numpy type of the dtype's size, with
its safetensors dtype beside it (BF16, F16 or F32). `rounded_to` is the type that the model is served in: values of
another float type are rounded to it first, to nearest, ties to even, as transformers loads them. `threads` defaults to
the cores of this process. `out` takes arrays to write to, so that a caller can reuse them.

The C extension computes (`native`). Where it is not built, torch is imported and does the same (`plain`), more slowly.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import numpy as np

from builder.formats.kernels import native

Array = np.ndarray[Any, Any]
Float = Literal["BF16", "F16", "F32"]

BLOCK = 16  # NVFP4: inputs that share an E4M3 scale
BITS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<u2"), "F32": np.dtype("<u4")}


VARIABLE = "BUILDER_KERNELS"  # forces a path


def path() -> str:
    """What computes: avx512, avx2 or baseline (SSE2 on x86-64, NEON on ARM) in C, or torch.

    ValueError if the variable BUILDER_KERNELS asks for another, or for one that can't run here.
    """
    there = [*native.paths(), "torch"]
    asked = os.environ.get(VARIABLE) or there[0]
    if asked not in there:
        raise ValueError(f"{VARIABLE} is {asked!r}, and here it can be {', '.join(there)}")
    return asked


def largest(values: Array, dtype: str, *, rounded_to: str | None = None, threads: int | None = None) -> float:
    """The largest magnitude: NaN if there is a NaN, else inf if there is one, 0.0 for an empty array."""
    row = _bits(values, dtype).reshape(1, -1)
    return float(largest_rows(row, dtype, rounded_to=rounded_to, threads=threads)[0])


def largest_rows(values: Array, dtype: str, *, rounded_to: str | None = None, threads: int | None = None) -> Array:
    """The largest magnitude of each row as float32 [rows]; NaN for a row with a NaN."""
    rows = _bits(values, dtype)
    if not rows.size:
        return np.zeros(len(rows), np.float32)
    found: Array = _path().largest_rows(rows, dtype, _rounded(dtype, rounded_to), _threads(threads))
    return found


def pack_nvfp4(
    values: Array,
    dtype: str,
    global_scale: float,
    *,
    rounded_to: str | None = None,
    threads: int | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """(codes uint8 [rows, inputs / 2], E4M3 block scales uint8 [rows, inputs / 16]) under a float32 `global_scale`,
    which is the largest magnitude / 2688 of all weights that share it.

    ValueError if the inputs are not a multiple of 16, or if the scale is not finite and positive.
    """
    rows = _bits(values, dtype)
    if rows.shape[1] % BLOCK:
        raise ValueError(f"NVFP4 needs a last dimension that is a multiple of {BLOCK}, got {rows.shape[1]}")
    if not (math.isfinite(global_scale) and global_scale > 0):
        raise ValueError(f"no NVFP4 scale for this tensor: its global scale is {global_scale}")
    shapes = (len(rows), rows.shape[1] // 2), (len(rows), rows.shape[1] // BLOCK)
    codes, scales = out or (np.empty(shapes[0], np.uint8), np.empty(shapes[1], np.uint8))
    _check(codes, shapes[0], np.uint8)
    _check(scales, shapes[1], np.uint8)
    _path().pack_nvfp4(rows, dtype, _rounded(dtype, rounded_to), global_scale, codes, scales, _threads(threads))
    return codes, scales


def pack_fp8(
    values: Array,
    dtype: str,
    scale: float | Array,
    *,
    rounded_to: str | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """E4M3 codes uint8 [rows, inputs] of values / scale, saturated at 448. `scale`: one, or float32 [rows].

    A scale that is not above zero (a row of zeros) counts as 1. NaN keeps its sign.
    """
    rows = _bits(values, dtype)
    codes = np.empty(rows.shape, np.uint8) if out is None else out
    _check(codes, rows.shape, np.uint8)
    _path().pack_fp8(rows, dtype, _rounded(dtype, rounded_to), _scales(scale, len(rows)), codes, _threads(threads))
    return codes


def unpack_nvfp4(
    codes: Array,
    block_scales: Array,
    global_scale: float,
    dtype: str,
    *,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Codes uint8 [rows, inputs / 2] and E4M3 block scales uint8 [rows, inputs / 16] -> raw bits [rows, inputs] in
    `dtype`, rounded to nearest from float32. ValueError if the shapes do not match."""
    shape = len(codes), codes.shape[1] * 2
    _check(codes, codes.shape, np.uint8)
    if shape[1] % BLOCK or block_scales.shape != (shape[0], shape[1] // BLOCK):
        raise ValueError(f"packed {codes.shape} and block scales {block_scales.shape} do not match")
    _check(block_scales, block_scales.shape, np.uint8)
    values = np.empty(shape, BITS[dtype]) if out is None else out
    _check(values, shape, BITS[dtype])
    _path().unpack_nvfp4(codes, block_scales, global_scale, dtype, values, _threads(threads))
    return values


def unpack_fp8(
    codes: Array, scale: float | Array, dtype: str, *, threads: int | None = None, out: Array | None = None
) -> Array:
    """E4M3 codes uint8 [rows, inputs] times their scale, one or float32 [rows] -> raw bits in `dtype`.

    The factor is that of `arithmetic/fp8.py`, which may differ from the scale in its last bit.
    """
    _check(codes, codes.shape, np.uint8)
    values = np.empty(codes.shape, BITS[dtype]) if out is None else out
    _check(values, codes.shape, BITS[dtype])
    _path().unpack_fp8(codes, _scales(scale, len(codes)), dtype, values, _threads(threads))
    return values


def _path() -> Any:
    """The functions of the chosen path."""
    chosen = path()
    if chosen != "torch":
        return native.Native(chosen)
    from builder.formats.kernels import plain

    return plain


def _bits(values: Array, dtype: str) -> Array:
    """The array as unsigned integers of the dtype's size."""
    if dtype not in BITS:
        raise ValueError(f"weights are {', '.join(BITS)}, not {dtype}")
    if values.ndim != 2 or values.itemsize != BITS[dtype].itemsize or not values.flags.c_contiguous:
        raise ValueError(f"{dtype} needs a contiguous matrix of {BITS[dtype].itemsize} bytes each: {values.dtype} "
                         f"{values.shape} is not")  # fmt: skip
    return values.view(BITS[dtype])


def _rounded(dtype: str, rounded_to: str | None) -> str | None:
    """The type to round to first, None where the values have it."""
    if rounded_to not in (None, *BITS):
        raise ValueError(f"weights are rounded to {', '.join(BITS)}, not to {rounded_to}")
    return None if rounded_to in (dtype, "F32") else rounded_to


def _scales(scale: float | Array, rows: int) -> Array:
    """One float32 scale for each row, or one in all."""
    scales = np.asarray(scale, np.float32).reshape(-1)
    if len(scales) not in (1, rows):
        raise ValueError(f"{len(scales)} scales for {rows} rows")
    return scales


def _check(array: Array, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"needed a contiguous {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")


def _threads(threads: int | None) -> int:
    return threads or len(os.sched_getaffinity(0))
