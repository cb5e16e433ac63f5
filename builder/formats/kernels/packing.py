"""Weights as raw bits -> NVFP4, FP8 and INT8 codes, with scales, and back. Bytes equal those of `formats/arithmetic`.

Arrays are C-contiguous, on the CPU. `values` holds raw bits: [rows, inputs] of any numpy type of the dtype's size, with
its safetensors dtype beside it (BF16, F16 or F32). `rounded_to` is the type that the model is served in: values of
another float type are rounded to it first, to nearest, ties to even, as transformers loads them. `threads` defaults to
the cores of this process. `out` takes arrays to write to, so that a caller can reuse them.

The C extension computes (`native`). Where it is not built, torch is imported and does the same (`plain`), more slowly.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any

import numpy as np

from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.formats.kernels import native
from builder.formats.kernels.arrays import BITS, Array, Weights

BLOCK = 16  # NVFP4: inputs that share an E4M3 scale


VARIABLE = "BUILDER_KERNELS"  # forces a path
# How to get the C extension.
BUILD_HINT = "Install a C compiler and Python's headers (gcc, python3-dev), then install the builder again with pip"


def path() -> str:
    """What computes: avx512, avx2 or baseline (SSE2 on x86-64, NEON on ARM) in C, or torch.

    UsageError if the variable BUILDER_KERNELS asks for another, or for one that can't run here. UnsupportedError if
    there is neither.
    """
    compiled, asked = native.paths(), os.environ.get(VARIABLE)
    if compiled and (not asked or asked in compiled):  # without a search for torch: this is called for each block
        return asked or compiled[0]
    there = [*compiled, *(["torch"] if find_spec("torch") else [])]
    if not there:
        raise UnsupportedError(
            "Weights are packed by a C extension or by torch, and neither is here.",
            why=f"In this Python environment {native.missing()}, and torch is not installed.",
            hint=f"{BUILD_HINT}. Or install it with its quantize extra, which brings torch",
        )
    if asked and asked not in there:
        raise UsageError(
            f"{VARIABLE} is {asked!r}, and here it can be {', '.join(there)}.",
            hint=f"Unset {VARIABLE}, or set it to one of these.",
        )
    return asked or there[0]


def warn_if_slow(out: Output) -> None:
    """Warns where torch will pack weights because the C extension is missing, or older than its source."""
    if (why := native.missing()) and find_spec("torch"):
        out.warn(f"torch packs the weights, several times more slowly: {why}. {BUILD_HINT}")


def largest(values: Array, dtype: str, *, rounded_to: str | None = None, threads: int | None = None) -> float:
    """The largest magnitude: NaN if there is a NaN, else inf if there is one, 0.0 for an empty array."""
    row = _weights(values, dtype).bits.reshape(1, -1)
    return float(largest_rows(row, dtype, rounded_to=rounded_to, threads=threads)[0])


def largest_rows(values: Array, dtype: str, *, rounded_to: str | None = None, threads: int | None = None) -> Array:
    """The largest magnitude of each row as float32 [rows]; NaN for a row with a NaN."""
    weights = _weights(values, dtype, rounded_to)
    if not values.size:
        return np.zeros(len(values), np.float32)
    found: Array = _path().largest_rows(weights, _threads(threads))
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
    rows, inputs = values.shape
    made = out or (np.empty((rows, inputs // 2), np.uint8), np.empty((rows, inputs // BLOCK), np.uint8))
    return _pack_nvfp4(_weights(values, dtype, rounded_to), global_scale, made, _threads(threads), searched=False)


def search_nvfp4(
    values: Array, dtype: str, global_scale: float, *, rounded_to: str | None = None, threads: int | None = None
) -> tuple[Array, Array]:
    """The same, with the block scales of least squared error (`formats/arithmetic/nvfp4_search.py`)."""
    rows, inputs = values.shape
    made = np.empty((rows, inputs // 2), np.uint8), np.empty((rows, inputs // BLOCK), np.uint8)
    return _pack_nvfp4(_weights(values, dtype, rounded_to), global_scale, made, _threads(threads), searched=True)


def _pack_nvfp4(
    weights: Weights, global_scale: float, made: tuple[Array, Array], threads: int, *, searched: bool
) -> tuple[Array, Array]:
    rows, inputs = weights.bits.shape
    if inputs % BLOCK:
        raise ValueError(f"NVFP4 needs a last dimension that is a multiple of {BLOCK}, got {inputs}")
    if not (math.isfinite(global_scale) and global_scale > 0):
        raise ValueError(f"no NVFP4 scale for this tensor: its global scale is {global_scale}")
    codes, scales = _checked(made[0], (rows, inputs // 2)), _checked(made[1], (rows, inputs // BLOCK))
    _path().pack_nvfp4(weights, global_scale, codes, scales, threads, searched=searched)
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
    weights = _weights(values, dtype, rounded_to)
    codes = _checked(np.empty(values.shape, np.uint8) if out is None else out, values.shape)
    _path().pack_fp8(weights, _scales(scale, len(values)), codes, _threads(threads))
    return codes


def pack_int8(
    values: Array,
    dtype: str,
    scales: Array,
    *,
    rounded_to: str | None = None,
    threads: int | None = None,
    unsigned: bool = False,
) -> Array:
    """INT8 codes [rows, inputs], as uint8, of values / scale, saturated at -128 and 127.

    `scales`: float32 [rows], above zero. Values hold no NaN. unsigned: 128 is added, so codes are from 0 to 255."""
    weights = _weights(values, dtype, rounded_to)
    if scales.shape != (len(values),):
        raise ValueError(f"{len(scales)} scales for {len(values)} rows")
    codes = np.empty(values.shape, np.uint8)
    _path().pack_int8(weights, np.ascontiguousarray(scales, np.float32), 128 * unsigned, codes, _threads(threads))
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
    rows, inputs = len(codes), codes.shape[1] * 2
    if inputs % BLOCK or block_scales.shape != (rows, inputs // BLOCK):
        raise ValueError(f"packed {codes.shape} and block scales {block_scales.shape} do not match")
    blocks = _checked(block_scales, block_scales.shape)
    values = _checked(np.empty((rows, inputs), BITS[dtype]) if out is None else out, (rows, inputs), BITS[dtype])
    _path().unpack_nvfp4(_checked(codes, codes.shape), blocks, global_scale, dtype, values, _threads(threads))
    return values


def unpack_fp8(
    codes: Array, scale: float | Array, dtype: str, *, threads: int | None = None, out: Array | None = None
) -> Array:
    """E4M3 codes uint8 [rows, inputs] times their scale, one or float32 [rows] -> raw bits in `dtype`.

    The factor is that of `arithmetic/fp8.py`, which may differ from the scale in its last bit.
    """
    values = _checked(np.empty(codes.shape, BITS[dtype]) if out is None else out, codes.shape, BITS[dtype])
    _path().unpack_fp8(_checked(codes, codes.shape), _scales(scale, len(codes)), dtype, values, _threads(threads))
    return values


def _path() -> Any:
    """The functions of the chosen path."""
    chosen = path()
    if chosen != "torch":
        return native.Native(chosen)
    from builder.formats.kernels import plain

    return plain


def _weights(values: Array, dtype: str, rounded_to: str | None = None) -> Weights:
    """The array as unsigned integers of the dtype's size."""
    if not {dtype, rounded_to} <= {*BITS, None}:
        raise ValueError(f"weights are {', '.join(BITS)}, not {dtype} rounded to {rounded_to}")
    if values.ndim != 2 or values.itemsize != BITS[dtype].itemsize or not values.flags.c_contiguous:
        size = BITS[dtype].itemsize
        raise ValueError(f"{dtype} needs a contiguous matrix of {size} bytes each, got {values.dtype} {values.shape}")
    return Weights(values.view(BITS[dtype]), dtype, None if rounded_to in (dtype, "F32") else rounded_to)


def _scales(scale: float | Array, rows: int) -> Array:
    """One float32 scale for each row, or one in all."""
    scales = np.asarray(scale, np.float32).reshape(-1)
    if len(scales) not in (1, rows):
        raise ValueError(f"{len(scales)} scales for {rows} rows")
    return scales


def _checked(array: Array, shape: tuple[int, ...], dtype: Any = np.uint8) -> Array:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"needed a contiguous {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
    return array


def _threads(threads: int | None) -> int:
    return threads or len(os.sched_getaffinity(0))
