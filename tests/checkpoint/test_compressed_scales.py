"""Global scales as multipliers and as divisors: there and back to the same bytes, and the same weights."""

from __future__ import annotations

import math
import struct
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.checkpoint.compressed_tensors import scales
from builder.checkpoint.compressed_tensors.scales import Scale
from builder.checkpoint.compressed_tensors.tensors import to_divisor, to_multiplier
from builder.formats.registry import FP8, NVFP4

GLOBAL, PLAIN = NVFP4.tensors[2], FP8.tensors[1]
FLOATS = st.one_of(st.floats(width=32), st.floats(2**-40, 2**10, width=32))


def f32(value: float, shape: tuple[int, ...] = ()) -> Scale:
    return Scale("F32", shape, struct.pack("<f", value))


def number(scale: Scale) -> float:
    return float(struct.unpack("<f", scale.data)[0])


@given(FLOATS, st.sampled_from([GLOBAL, PLAIN, None]))
def test_there_and_back_gives_the_same_bytes(value: float, tensor: object) -> None:
    there, back = partial(to_divisor, tensor), partial(to_multiplier, tensor)
    scale = f32(value)
    made, record = scales.converted(scale, there, back)
    assert (made.dtype, made.shape) == ("F32", (1,))
    again, _ = scales.converted(made, back, there, record)
    assert again == scale


@given(st.integers(0, 0xFFFF), st.sampled_from(["BF16", "F16"]), st.sampled_from([GLOBAL, PLAIN, None]))
def test_a_half_precision_scale_of_another_tool_comes_back_as_it_was(bits: int, dtype: str, tensor: object) -> None:
    there, back = partial(to_multiplier, tensor), partial(to_divisor, tensor)
    scale = Scale(dtype, (1,), struct.pack("<H", bits))
    made, record = scales.converted(scale, there, back)
    assert (made.dtype, made.shape) == ("F32", ())
    again, _ = scales.converted(made, back, there, record)
    assert again == scale


def test_a_column_of_half_precision_scales_is_recorded_by_its_type_alone() -> None:
    from builder.formats.base import OUT, StoredTensor

    column = StoredTensor("weight_scale", "weight_scale", "x", ("F32",), (OUT,), "positive", "scales")
    there, back = partial(to_multiplier, column), partial(to_divisor, column)
    scale = Scale("BF16", (3, 1), struct.pack("<3H", 0x3F80, 0x3C01, 0x4000))
    made, record = scales.converted(scale, there, back)
    assert (made.dtype, made.shape) == ("F32", (3,))
    assert record == {"dtype": "BF16", "shape": [3, 1]}
    assert scales.converted(made, back, there, record)[0] == scale


@pytest.mark.parametrize(
    "record", [None, [], {"dtype": "F32"}, {"dtype": "F99", "shape": [1], "data": "00"}, {"dtype": "F32", "shape": "x"},
               {"dtype": "F32", "shape": [], "data": "zz"}, {"dtype": "F32", "shape": [9], "data": "0000803f"},
               {"dtype": "F32", "shape": [], "data": "0000a03f"}],
)  # fmt: skip
def test_a_record_that_is_damaged_or_of_another_scale_does_not_count(record: object) -> None:
    made, _ = scales.converted(f32(4.0, (1,)), partial(to_multiplier, GLOBAL), partial(to_divisor, GLOBAL), record)
    assert number(made) == 0.25


def test_the_weights_are_the_same_for_every_maximum_of_a_bf16_weight_but_one() -> None:
    values = [scales.float32(significand / 2688) for significand in range(128, 256)]
    wrong = [v for v in values if not scales._same_weights(v, number(scales.multiplier_to_divisor(f32(v))))]
    assert [math.frexp(value)[0] * 2 for value in wrong] == [1.75]  # 147 / 2688


def bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def differ(scale: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """Where the two give another BF16 weight for some block scale and code."""
    found = np.zeros(scale.shape, bool)
    for block in scales.BLOCK_SCALES:
        ours, theirs = np.float32(block) * scale, np.float32(block) / divisor
        for code in scales.CODES:
            found |= bfloat16(ours * np.float32(code)) != bfloat16(theirs * np.float32(code))
    return found


@pytest.mark.slow
def test_every_significand_was_tried() -> None:
    """Exponents don't matter: scaling by a power of two is exact in float32 and in BF16."""
    scale = (np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    first = np.float32(1) / scale
    plain = differ(scale, first)
    near = [differ(scale[plain], (first[plain].view(np.int32) + step).view(np.float32)) for step in (-1, 1)]
    assert (plain.sum(), (near[0] & near[1]).sum()) == (480, 50)
    for value in (*scale[plain], *scale[:: 1 << 12]):  # the module finds the neighbour that numpy finds
        made = np.float32(number(scales.multiplier_to_divisor(f32(float(value)))))
        assert scales._same_weights(float(value), float(made)) == (not differ(np.array([value]), np.array([made]))[0])


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1e-44, 3e38, -2.0])
def test_a_scale_that_can_not_be_right_is_converted_all_the_same(value: float) -> None:
    """Conversions are for repairs too; inspection reports such scales."""
    made, record = scales.converted(f32(value), partial(to_divisor, GLOBAL), partial(to_multiplier, GLOBAL))
    assert scales.converted(made, partial(to_multiplier, GLOBAL), partial(to_divisor, GLOBAL), record)[0] == f32(value)
    assert scales.plausible(f32(value)) == (0 < value < math.inf)
