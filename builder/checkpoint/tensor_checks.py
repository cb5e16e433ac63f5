"""Detects bad values in a tensor: NaN, Inf, all zeros, holes, uninitialized memory.

`wrong_...` return what is wrong, as the rest of a sentence after the tensor's name, or "". Imports numpy at the top,
because only stages import this module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.core.safetensors_io import StoredBytes, TensorInfo
from builder.formats.base import Content

# For each float dtype: the integer type of its bits, the mask without the sign bit, and the smallest magnitude that is
# Inf or NaN.
BITS: Mapping[str, tuple[str, int, int]] = {
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F8_E4M3": ("u1", 0x7F, 0x7F),  # no infinity, NaN is 0x7f and 0xff
}
SMALLEST_NORMAL = 2.0**-126
# A scale is an amax divided by 2688 or 448, and the largest known activations in LLMs are thousands (arXiv 2402.17762).
IMPLAUSIBLE = 1e9
# A model's inputs and weights have magnitudes far above 1e-17, which this scale would mean.
TOO_SMALL = 1e-20
STEP = 1 << 20
# Zeros of this many bytes in a row, whole pages of a file that was not written to the end, are reported as a hole.
PAGE, HOLE = 4096, 1 << 16
FIRST = 1 << 13  # bytes that almost always tell
NEVER = 0x7F  # E4M3's NaN; above it are negative numbers
# The lower three bits of an E2M1 code that mean 6, the largest magnitude.
LARGEST = 7


@dataclass(frozen=True)
class Checked:
    """What is wrong with a tensor, as the rest of a sentence after its name, or "". peak: its largest magnitude, where
    the check reads all of it; None elsewhere."""

    wrong: str
    peak: float | None = None


def check(
    content: Content, info: TensorInfo, data: StoredBytes, *, zeros: bool = False, divides: bool = False
) -> Checked:
    """Checks the numbers of a tensor. zeros: accept a matrix of zeros, in a layer that was left unquantized. divides:
    the tensor holds 1 / scale."""
    if content == "scale":
        value = scalar(info, data)
        return Checked(wrong_scale(value, divides=divides), value)
    if content == "block_scales":
        largest = _largest(data)
        return Checked("", e4m3(largest)) if 0 < largest < NEVER else Checked(wrong_blocks(data))
    if content == "codes":
        return Checked(wrong_codes(data))
    if content == "integers":
        return _integers(info, data)
    wrong = wrong_floats(info, data, zeros=zeros)
    if content == "positive" and not wrong:
        wrong = wrong_positive(info, data)
    peak = e4m3(_magnitude(data, "u1")) if info.dtype == "F8_E4M3" and not wrong else None
    return Checked(wrong, peak)


def scalar(info: TensorInfo, data: StoredBytes) -> float:
    """The value of one number."""
    return float(floats(info.dtype, data[:])[0])


def integers(info: TensorInfo, data: StoredBytes) -> tuple[int, ...]:
    """The values of I64 or I32 numbers."""
    return tuple(np.frombuffer(data[:], {"I64": "<i8", "I32": "<i4"}[info.dtype]).tolist())


def floats(dtype: str, data: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """F32, F16 or BF16 values as float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def e4m3(code: int) -> float:
    """The value of a positive E4M3 number."""
    exponent, mantissa = code >> 3, code & 7
    return math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)


def wrong_scale(value: float, *, divides: bool = False) -> str:
    """Checks the value of a scale, or of 1 / scale."""
    low, high = (1 / IMPLAUSIBLE, 1 / TOO_SMALL) if divides else (TOO_SMALL, IMPLAUSIBLE)
    if low <= value <= high:
        return ""
    if 0 < value < SMALLEST_NORMAL:
        return f"is {value:.3g}, a denormal, as in uninitialized memory"
    return f"is {value:.3g}; a scale must be finite, positive and plausible"


def wrong_positive(info: TensorInfo, data: StoredBytes) -> str:
    """Checks finite floats of which each is a scale."""
    values = floats(info.dtype, data[:])
    wrong = int(np.count_nonzero(values <= 0))
    return f"has {wrong} values of {values.size} that are zero or negative" if wrong else ""


def wrong_blocks(data: StoredBytes) -> str:
    """Checks E4M3 block scales. Single zeros are valid (the scale of that block underflowed), and so are denormals,
    which E4M3 is designed to use."""
    if 0 < _largest(data) < NEVER:
        return ""
    nans, negative = 0, 0
    for part in _parts(data, "u1"):
        nans += int(np.count_nonzero((part & 0x7F) == 0x7F))
        negative += int(np.count_nonzero(part >= 0x80))
    return f"has {nans} NaN and {negative} negative values of {len(data)}" if nans or negative else "is all zero"


def wrong_codes(data: StoredBytes) -> str:
    """Checks packed E2M1 values: they must not all be zero (codes 0 and 8)."""
    return "" if _any(data, 0x77) else "is all zero"


def uses_largest(data: StoredBytes) -> bool:
    """Whether packed E2M1 values contain the largest magnitude, as they do where block scales are amax / 6."""
    for part in itertools.chain([np.frombuffer(data[:FIRST], "u1")], _parts(data, "u1")):
        if ((part & 0x07) == LARGEST).any() or ((part & 0x70) == LARGEST << 4).any():
            return True
    return False


def hole(data: StoredBytes) -> tuple[int, int] | None:
    """(first byte, length) of the first run of zeros of at least HOLE bytes, whole pages; None if there is none."""
    end = len(data) // PAGE * PAGE
    for start in np.flatnonzero(np.frombuffer(data.every(HOLE, 8), "<u8") == 0).tolist():  # each hole has one of them
        begin, after = start * HOLE, _zeros_end(data, start * HOLE, end)
        while after > begin and begin and _zeros_end(data, begin - PAGE, begin) == begin:
            begin -= PAGE
        if after - begin >= HOLE:
            return begin, after - begin
    return None


def _zeros_end(data: StoredBytes, begin: int, end: int) -> int:
    """Where the first page that is not all zero begins, from `begin` on, which begins a page; `end` if none is."""
    for at in itertools.chain([begin], range(begin + PAGE, end, STEP)):
        stop = min(at + (PAGE if at == begin else STEP), end)
        filled = np.frombuffer(data[at:stop], "<u8").reshape(-1, PAGE // 8).any(axis=1)
        if filled.any():
            return at + int(filled.argmax()) * PAGE
    return end


def _integers(info: TensorInfo, data: StoredBytes) -> Checked:
    """INT8 values, packed INT4 (U8, or I8 of the same bytes), or packed INT8 (I32, where zero has the bits 0x80): they
    must not all be zero."""
    if not _any(data, 0x7F if info.dtype == "I32" and len(info.shape) == 2 else 0xFF):
        return Checked("is all zero")
    return Checked("")


def wrong_floats(info: TensorInfo, data: StoredBytes, *, zeros: bool = False) -> str:
    """Checks a tensor of floats for NaN and Inf, and that a matrix is not all zero; `zeros` accepts that, in a layer
    that was left unquantized."""
    if info.dtype not in BITS or not info.nbytes:
        return ""
    form, magnitude, limit = BITS[info.dtype]
    peak = _magnitude(data, form)
    if peak >= limit:
        nans = sum(int((part & magnitude > limit).sum()) for part in _parts(data, form))
        infs = sum(int((part & magnitude == limit).sum()) for part in _parts(data, form))
        return f"has {nans} NaN and {infs} Inf of {len(data) // int(form[-1])} values"
    return "is all zero" if peak == 0 and len(info.shape) == 2 and not zeros else ""


def _magnitude(data: StoredBytes, form: str) -> int:
    """The bits of the largest magnitude of floats, whose first bit is the sign: the largest positive number as a signed
    integer, and the largest of all as an unsigned one. Two maxima need no temporary array."""
    positive, negative, sign = 0, 0, 1 << 8 * int(form[-1]) - 1
    for part in _parts(data, form):
        positive = max(positive, int(part.view(form.replace("u", "i")).max()))
        negative = max(negative, int(part.max()) - sign)
    return max(positive, negative)


def _largest(data: StoredBytes) -> int:
    """The largest byte."""
    return max(int(part.max()) for part in _parts(data, "u1"))


def _any(data: StoredBytes, mask: int) -> bool:
    """Whether some byte has one of these bits. The first step almost always tells."""
    first = np.frombuffer(data[:FIRST], "u1")
    if (first & mask).any():
        return True
    return any((part & mask).any() for part in _parts(data, "u1"))


def _parts(data: StoredBytes, form: str) -> Iterator[np.ndarray[Any, Any]]:
    """The numbers, STEP bytes at a time."""
    return (np.frombuffer(data[start : start + STEP], form) for start in range(0, len(data), STEP))
