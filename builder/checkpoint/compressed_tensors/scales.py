"""Scales that compressed-tensors stores as reciprocals, and scales of other types: exact conversions both ways.

ModelOpt multiplies by a global scale, `code * (block_scale * scale)`, and compressed-tensors divides by it,
`code * (block_scale / global_scale)` (quantization/lifecycle/forward_helpers.py, _dequantize, 0.18). Both compute in
float32 and round the weight to BF16. With global_scale = float32(1 / scale), or one of its two neighbours where that
one fails, the weights are the same bits for all but 50 of the 2**23 significands of a float32 scale. Of the 128 that a
BF16 weight's maximum leads to (over 2688), one fails, 1.75: there `code * (block_scale * scale)` is halfway between two
BF16 numbers for some codes and block scales, the division misses that by the last bit of a float32, and these weights
differ by the last bit of a BF16. tests/checkpoint/test_compressed_scales.py counts all of them.

A reciprocal can't always be inverted: of two neighbouring floats just below a power of two, both may have the same one.
`converted` therefore says what has to be recorded so that the way back gives the same bytes. Standard library only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WIDTH = {"BF16": 2, "F16": 2, "F32": 4}
# The products of an E4M3 significand and an E2M1 one, up to powers of two: which block scales and codes there are.
BLOCK_SCALES, CODES = tuple(n / 8 for n in range(8, 16)), (1.0, 1.5)


@dataclass(frozen=True)
class Scale:
    """A stored scale: one number, or one for each output."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def float32(value: float) -> float:
    """The nearest float32; infinity for what is too large."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def widened(scale: Scale) -> Scale:
    """The scale in F32, exactly."""
    if scale.dtype == "F32":
        return scale
    if scale.dtype == "BF16":  # its bits are the upper half of an F32's
        data = bytearray(2 * len(scale.data))
        data[2::4], data[3::4] = scale.data[::2], scale.data[1::2]
        return Scale("F32", scale.shape, bytes(data))
    number = len(scale.data) // 2
    return Scale("F32", scale.shape, struct.pack(f"<{number}f", *struct.unpack(f"<{number}e", scale.data)))


def narrowed(scale: Scale, dtype: str) -> Scale:
    """An F32 scale in the type that it was widened from."""
    if dtype == "BF16":
        data = bytearray(len(scale.data) // 2)
        data[::2], data[1::2] = scale.data[2::4], scale.data[3::4]
        return Scale(dtype, scale.shape, bytes(data))
    if dtype == "F16":
        number = len(scale.data) // 4
        return Scale(dtype, scale.shape, struct.pack(f"<{number}e", *struct.unpack(f"<{number}f", scale.data)))
    return scale


def multiplier_to_divisor(scale: Scale) -> Scale:
    """weight_scale_2 or input_scale -> weight_global_scale or input_global_scale. Any number, also NaN, 0 or Inf."""
    value = struct.unpack("<f", widened(scale).data)[0]
    return _number(_nearest(value, lambda divisor: _same_weights(value, divisor)))


def divisor_to_multiplier(scale: Scale) -> Scale:
    """The inverse, up to rounding."""
    value = struct.unpack("<f", widened(scale).data)[0]
    return _number(_nearest(value, lambda multiplier: _same_weights(multiplier, value)))


def _number(value: float) -> Scale:
    return Scale("F32", (), struct.pack("<f", value))


def _nearest(value: float, good: Callable[[float], bool]) -> float:
    """The reciprocal in float32, or the one of its neighbours that is `good`, if it isn't."""
    if not math.isfinite(value):
        return 0.0 * value if math.isnan(value) else math.copysign(0.0, value)
    first = float32(1 / value) if value else math.copysign(math.inf, value)
    if not 2.0**-126 <= abs(first) < math.inf:
        return first
    bits = struct.unpack("<i", struct.pack("<f", first))[0]
    near = [struct.unpack("<f", struct.pack("<i", bits + step))[0] for step in (0, -1, 1)]
    return next((one for one in near if math.isfinite(one) and good(one)), first)


def _same_weights(multiplier: float, divisor: float) -> bool:
    """Whether both give the same BF16 weights for every block scale and code."""
    if not 2.0**-100 < abs(multiplier) < 2.0**100:  # float32 would overflow, or lose bits
        return True
    for block in BLOCK_SCALES:
        ours, theirs = float32(block * multiplier), float32(block / divisor)
        if ours != theirs and any(_bfloat16(ours * code) != _bfloat16(theirs * code) for code in CODES):
            return False
    return True


def _bfloat16(value: float) -> int:
    """The bits of the nearest BF16 of float32(value); ties to even."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def converted(
    scale: Scale, forward: Callable[[Scale], Scale], backward: Callable[[Scale], Scale], recorded: Any = None
) -> tuple[Scale, dict[str, Any] | None]:
    """The scale by `forward`, and what to record beside it so that the way back is exact: None if `backward` is.

    recorded: what an earlier conversion in the other direction recorded. It counts if it still leads to this scale.
    """
    made = forward(scale)
    before = _from_record(recorded, made)
    if before is not None and backward(before) == scale:
        made = before
    back = backward(made)
    if back == scale:
        return made, None
    record: dict[str, Any] = {"dtype": scale.dtype, "shape": list(scale.shape)}
    if scale.dtype not in WIDTH or narrowed(back, scale.dtype).data != scale.data:
        record["data"] = scale.data.hex()
    return made, record


def _from_record(record: Any, made: Scale) -> Scale | None:
    """The scale that was recorded; None if there is none, or it can't be read."""
    if not isinstance(record, Mapping) or record.get("dtype") not in WIDTH:
        return None
    try:
        shape = tuple(int(size) for size in record["shape"])
        data = bytes.fromhex(record["data"]) if "data" in record else narrowed(made, record["dtype"]).data
    except (KeyError, TypeError, ValueError, OverflowError, struct.error):
        return None
    whole = math.prod(shape) * WIDTH[record["dtype"]] == len(data)
    return Scale(record["dtype"], shape, data) if whole else None


def plausible(scale: Scale) -> bool:
    """Whether all numbers are finite and positive."""
    data = widened(scale).data
    return all(0 < value < math.inf for value in struct.unpack(f"<{len(data) // 4}f", data))
