"""The C extension from several threads: each packs or unpacks a part of the matrix. Imports numpy only.

Why C: it packs 4 GB/s of BF16 on one core, 50 times as much as torch, and needs neither torch's import nor a compiler
where it runs. benchmarks/kernels.py measures it and says what was rejected.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from builder.formats.kernels.arrays import Array, Weights

try:
    from builder.formats.kernels import _native
except ImportError:  # not compiled, or for another machine
    _native = None  # type: ignore[assignment]

SOURCES = ("native.c", "loops.h", "search.h")
_TYPES: dict[str | None, int] = {None: -1, "BF16": 0, "F16": 1, "F32": 2}
_BLOCK = 16
_PART = 1 << 18  # elements that are worth a thread


def paths() -> list[str]:
    """The instruction sets that can run here, the fastest first: avx512, avx2, baseline. None without the extension."""
    return [] if missing() else _native.paths()


@functools.cache
def missing() -> str:
    """Why the extension can't be used, or ""."""
    if _native is None:
        return "the C extension is not compiled"
    return "" if source_digest() == _native.SOURCE else "the C extension is older than its source"


@functools.cache
def source_digest() -> str:
    """The digest of the C source, as hatch_build.py computes it."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()


class Native:
    """The functions of `plain`, computed with one of `paths()`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def largest_rows(self, weights: Weights, threads: int) -> Array:
        """The largest magnitude of each row, float32."""
        values, types = weights.bits, (_TYPES[weights.dtype], _TYPES[weights.rounded_to])

        def of_rows(matrix: Array) -> Array:
            found = np.empty(len(matrix), np.float32)
            _native.largest_rows(self.path, matrix, *types, len(matrix), found)
            return found

        if len(values) > 1:
            parts = _parts(len(values), values.shape[1], threads)
            return np.concatenate(_each(lambda part: of_rows(values[part]), parts, threads))
        found = _each(lambda part: of_rows(values[:, part]), _parts(values.size, 1, threads), threads)
        return np.maximum.reduce(np.array(found))  # type: ignore[no-any-return]  # NaN if there is one

    def pack_nvfp4(
        self, weights: Weights, scale: float, codes: Array, scales: Array, threads: int, *, searched: bool
    ) -> None:
        """Fills `codes` and `scales`."""
        types = _TYPES[weights.dtype], _TYPES[weights.rounded_to]
        blocks = weights.bits.reshape(-1, _BLOCK), codes.reshape(-1, _BLOCK // 2), scales.reshape(-1)

        def pack(part: slice) -> None:
            source, packed, block = (array[part] for array in blocks)
            _native.pack_nvfp4(self.path, source, *types, scale, searched, packed, block)

        _each(pack, _parts(len(blocks[0]), _BLOCK, threads), threads)

    def pack_fp8(self, weights: Weights, scales: Array, codes: Array, threads: int) -> None:
        """Fills `codes`."""
        types = _TYPES[weights.dtype], _TYPES[weights.rounded_to]

        def pack(part: slice) -> None:
            out = codes[part]
            _native.pack_fp8(self.path, weights.bits[part], *types, len(out), _own(scales, part), out)

        _each(pack, _parts(len(codes), codes.shape[1], threads), threads)

    def pack_int8(self, weights: Weights, scales: Array, sign: int, codes: Array, threads: int) -> None:
        """Fills `codes`."""
        types = _TYPES[weights.dtype], _TYPES[weights.rounded_to]

        def pack(part: slice) -> None:
            out = codes[part]
            _native.pack_int8(self.path, weights.bits[part], *types, len(out), scales[part], sign, out)

        _each(pack, _parts(len(codes), codes.shape[1], threads), threads)

    def unpack_nvfp4(self, codes: Array, scales: Array, scale: float, dtype: str, values: Array, threads: int) -> None:
        """Fills `values`."""
        blocks = codes.reshape(-1, _BLOCK // 2), scales.reshape(-1), values.reshape(-1, _BLOCK)

        def unpack(part: slice) -> None:
            packed, block, out = (array[part] for array in blocks)
            _native.unpack_nvfp4(self.path, packed, block, scale, _TYPES[dtype], out)

        _each(unpack, _parts(len(blocks[0]), _BLOCK, threads), threads)

    def unpack_fp8(self, codes: Array, scales: Array, dtype: str, values: Array, threads: int) -> None:
        """Fills `values`."""

        def unpack(part: slice) -> None:
            out = values[part]
            _native.unpack_fp8(self.path, codes[part], len(out), _own(scales, part), _TYPES[dtype], out)

        _each(unpack, _parts(len(codes), codes.shape[1], threads), threads)


def _parts(count: int, size: int, threads: int) -> list[slice]:
    """Slices of `count` rows, each with `size` elements: one for each thread, if they have enough to do."""
    step = max(1, -(-count // threads), _PART // max(1, size))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _each(work: Callable[[slice], Any], parts: Sequence[slice], threads: int) -> list[Any]:
    if len(parts) < 2 or threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(min(threads, len(parts))) as pool:
        return list(pool.map(work, parts))


def _own(scales: Array, rows: slice) -> Array:
    return scales if len(scales) == 1 else scales[rows]
