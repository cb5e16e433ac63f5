"""Detects bad values in a tensor: NaN, Inf, all zeros, uninitialized memory.

Each check returns what is wrong, as the rest of a sentence after the tensor's name, or "". Imports numpy at the top,
because only stages import this module.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from builder.core.safetensors_io import TensorInfo

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
STEP = 1 << 20


def wrong_scale(value: float) -> str:
    """Checks the value of a scale."""
    if SMALLEST_NORMAL <= value <= IMPLAUSIBLE:
        return ""
    if 0 < value < SMALLEST_NORMAL:
        return f"is {value:.3g}, a denormal, as in uninitialized memory"
    return f"is {value:.3g}; a scale must be finite, positive and plausible"


def wrong_blocks(data: memoryview) -> str:
    """Checks E4M3 block scales. Single zeros are valid (the scale of that block underflowed), and so are denormals,
    which E4M3 is designed to use."""
    if 0 < _peak(data, "u1", 0xFF) < 0x7F:
        return ""
    raw = np.frombuffer(data, "u1")
    nans, negative = int(np.count_nonzero((raw & 0x7F) == 0x7F)), int(np.count_nonzero(raw >= 0x80))
    return f"has {nans} NaN and {negative} negative values of {raw.size}" if nans or negative else "is all zero"


def wrong_codes(data: memoryview) -> str:
    """Checks packed E2M1 values: they must not all be zero (codes 0 and 8)."""
    return "" if _peak(data, "u1", 0x77, stop=True) else "is all zero"


def wrong_floats(info: TensorInfo, data: memoryview, *, zeros: bool = False) -> str:
    """Checks a tensor of floats for NaN and Inf, and that a matrix is not all zero; `zeros` accepts that, in a layer
    that was left unquantized."""
    if info.dtype not in BITS or not info.nbytes:
        return ""
    form, magnitude, limit = BITS[info.dtype]
    peak = _peak(data, form, magnitude)
    if peak >= limit:
        bad = np.frombuffer(data, form) & magnitude
        return f"has {int((bad > limit).sum())} NaN and {int((bad == limit).sum())} Inf of {bad.size} values"
    return "is all zero" if peak == 0 and len(info.shape) == 2 and not zeros else ""


def _peak(data: memoryview, form: str, mask: int, *, stop: bool = False) -> int:
    """The largest value of `bits & mask`, read in steps of a megabyte; with `stop`, the first one that is not zero."""
    peak = 0
    for start in range(0, len(data), STEP):
        peak = max(peak, int((np.frombuffer(data[start : start + STEP], form) & mask).max()))
        if stop and peak:
            break
    return peak
