"""INT8 and INT4: rounding, packing and dequantizing, against ModelOpt's functions where it has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.formats import registry
from builder.formats.arithmetic import int4, int8
from builder.formats.smoothing import scaled


def weight(seed: int, outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40))
def test_packing_int4_loses_nothing(seed: int, pairs: int, inputs: int) -> None:
    codes = torch.randint(-8, 8, (2 * pairs, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = int4.pack(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (pairs, inputs))
    assert torch.equal(int4.unpack(packed), codes)
    assert torch.equal(int4.unpack(packed.view(torch.int8)), codes)  # as TensorRT-LLM's layout calls it


def test_a_byte_holds_two_outputs_the_even_one_in_the_low_nibble() -> None:
    codes = torch.tensor([[-8, 7], [1, -1], [0, 3], [5, -3]], dtype=torch.int8)
    assert int4.pack(codes).tolist() == [[0x18, 0xF7], [0x50, 0xD3]]
    with pytest.raises(ValueError, match="even number of outputs, got 3"):
        int4.pack(codes[:3])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([64, 128]))
def test_int4_is_packed_as_modelopt_packs_it(seed: int, block: int) -> None:
    from modelopt.torch.export import quant_utils

    plain = weight(seed, 8, 256)
    scale = plain.float().view(8, -1, block).abs().amax(-1) / 7
    theirs = quant_utils.to_quantized_weight(plain, scale, "int4_awq", block_size=block)
    assert torch.equal(int4.pack(int4.quantize(plain, scale)), theirs)
    back = int4.dequantize(theirs, scale, torch.float32)
    error = (back - plain.float()).view(8, -1, block).abs().amax(-1)
    assert bool((error <= scale * 0.5001).all())
    rounded = registry.get("int4_awq" if block == 128 else "int4_awq_64").round_weight(plain, plain.abs().amax())
    assert (~torch.isclose(rounded, back, rtol=1e-5)).float().mean() < 0.01  # a tie may fall otherwise


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_int8_is_rounded_as_modelopt_rounds_it(seed: int) -> None:
    from modelopt.torch.export import quant_utils

    plain = weight(seed, 6, 40)
    scale = plain.float().abs().amax(-1) / 127
    theirs = quant_utils.to_quantized_weight(plain, scale, "int8_sq")
    assert torch.equal(int8.quantize(plain, scale), theirs)
    error = int8.dequantize(theirs, scale, torch.float32) - plain.float()
    assert bool((error.abs() <= scale[:, None] * 0.5001).all())


def test_int8_inputs_saturate() -> None:
    x = torch.tensor([-300.0, -128.4, -0.5, 0.5, 1.5, 126.6, 300.0])
    assert int8.fake_quantize(x, torch.tensor(1.0)).tolist() == [-128, -128, 0, 0, 2, 127, 127]


def test_zeros_stay_zeros() -> None:
    for name in ("int8_sq", "int4_awq", "int4_awq_64"):
        assert not registry.get(name).round_weight(torch.zeros(2, 128), torch.tensor(0.0)).any()


def test_scales_that_are_not_the_weights_are_rejected() -> None:
    with pytest.raises(ValueError, match="do not match"):
        int4.dequantize(torch.zeros(4, 256, dtype=torch.uint8), torch.ones(4, 2), torch.float32)


def test_inputs_are_scaled_in_their_own_type() -> None:
    x, scale = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0.5, 1, 2], dtype=torch.bfloat16)
    assert scaled(x, {}) is x
    assert scaled(x, {"pre_quant_scale": scale}).tolist() == [[0.5, 1, 2]] * 2
    assert scaled(x, {"pre_quant_scale": scale}).dtype == torch.float64
