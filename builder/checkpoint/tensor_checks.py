"""What is wrong with the numbers of a tensor: NaN, Inf, nothing but zeros, memory that nobody filled.

numpy is imported at the top: only stages import this file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from builder.core.safetensors_io import TensorInfo

# For each float dtype: its bits as an integer, those without the sign, and the smallest magnitude that is no number.
BITS: Mapping[str, tuple[str, int, int]] = {
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F8_E4M3": ("u1", 0x7F, 0x7F),  # no infinity, NaN is 0x7f and 0xff
}
SMALLEST_NORMAL = 2.0**-126
# A scale is an amax over 2688 or 448. The largest activations known in LLMs are thousands (arXiv 2402.17762).
IMPLAUSIBLE = 1e9
STEP = 1 << 20


def wrong_scale(value: float) -> str:
    """What is wrong with a scale; "" if nothing is."""
    if SMALLEST_NORMAL <= value <= IMPLAUSIBLE:
        return ""
    if 0 < value < SMALLEST_NORMAL:
        return f"is {value:.3g}, a denormal: uninitialised memory looks so"
    return f"is {value:.3g}, a scale must be finite, positive and plausible"


def wrong_blocks(data: memoryview) -> str:
    """What is wrong with E4M3 block scales. Single zeros are fine: a block whose scale underflowed. Denormals too:
    E4M3 is made to use them."""
    if 0 < _peak(data, "u1", 0xFF) < 0x7F:
        return ""
    raw = np.frombuffer(data, "u1")
    nans, negative = int(np.count_nonzero((raw & 0x7F) == 0x7F)), int(np.count_nonzero(raw >= 0x80))
    return f"has {nans} NaN and {negative} negative values of {raw.size}" if nans or negative else "is all zero"


def wrong_codes(data: memoryview) -> str:
    """What is wrong with packed E2M1 values: nothing but zeros, which are the codes 0 and 8."""
    return "" if _peak(data, "u1", 0x77, stop=True) else "is all zero"


def wrong_floats(info: TensorInfo, data: memoryview, *, zeros: bool = False) -> str:
    """What is wrong with a tensor of floats: NaN, Inf, or unless `zeros` are fine (a layer that was kept as it came) a
    matrix of nothing but zeros. "" if nothing is."""
    if info.dtype not in BITS or not info.nbytes:
        return ""
    form, magnitude, limit = BITS[info.dtype]
    peak = _peak(data, form, magnitude)
    if peak >= limit:
        bad = np.frombuffer(data, form) & magnitude
        return f"has {int((bad > limit).sum())} NaN and {int((bad == limit).sum())} Inf of {bad.size} values"
    return "is all zero" if peak == 0 and len(info.shape) == 2 and not zeros else ""


def _peak(data: memoryview, form: str, mask: int, *, stop: bool = False) -> int:
    """Largest value of `bits & mask`, megabyte by megabyte; with `stop` the first that is not zero."""
    peak = 0
    for start in range(0, len(data), STEP):
        peak = max(peak, int((np.frombuffer(data[start : start + STEP], form) & mask).max()))
        if stop and peak:
            break
    return peak
