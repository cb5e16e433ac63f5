"""The number format against itself, against exact arithmetic, and byte for byte against the installed ModelOpt."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from odd_weights import odd, raw, tensor

from builder.formats.arithmetic import fp8, nvfp4
from builder.formats.kernels import native, packing

ROUND = settings(max_examples=60)
HALVES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
ONE = torch.tensor(1.0)


def random_weight(seed: int, rows: int, blocks: int, dtype: torch.dtype, spread: float) -> torch.Tensor:
    """Blocks of very different sizes, some zero, some with values on ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks, nvfp4.BLOCK, generator=generator)
    x *= torch.exp(spread * torch.randn(rows, blocks, 1, generator=generator))
    x[torch.rand(rows, blocks, generator=generator) < 0.1] = 0
    tie = torch.rand(x.shape, generator=generator) < 0.2
    x[tie] = torch.tensor(HALVES)[torch.randint(7, (int(tie.sum()),), generator=generator)]
    x[0, 0, 0] = 6.0
    return x.flatten(1).to(dtype)


def normal(scales: torch.Tensor) -> torch.Tensor:
    """A mask over the elements: their block scale is a normal E4M3 number, so it was rounded by 1/16 at most."""
    return (scales.float() >= 2.0**-6).repeat_interleave(nvfp4.BLOCK, dim=-1)


weights = st.builds(
    random_weight,
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
)


@pytest.mark.parametrize(
    ("middle", "even"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
def test_a_tie_goes_to_the_even_code_and_its_neighbours_to_the_nearest(middle: float, even: float) -> None:
    at = torch.tensor(middle)
    below, above = torch.nextafter(at, torch.tensor(0.0)), torch.nextafter(at, torch.tensor(9.0))
    codes = nvfp4.round_magnitude(torch.stack((below, at, above)))
    values = [nvfp4.E2M1_VALUES[code] for code in codes]
    lower = max(v for v in nvfp4.E2M1_VALUES if v < middle)
    upper = min(v for v in nvfp4.E2M1_VALUES if v > middle)
    assert values == [lower, even, upper]
    assert codes[1] % 2 == 0


@given(st.floats(min_value=0, max_value=7, width=32))
def test_rounding_is_to_the_nearest_value(x: float) -> None:
    code = int(nvfp4.round_magnitude(torch.tensor([x]))[0])
    distance = [abs(Fraction(x) - Fraction(v)) for v in nvfp4.E2M1_VALUES]
    nearest = [i for i, d in enumerate(distance) if d == min(distance)]
    assert code == (nearest[0] if len(nearest) == 1 else next(i for i in nearest if i % 2 == 0))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_a_tensor_is_rounded_to_the_values_of_its_codes(x: list[float]) -> None:
    ties = torch.tensor(HALVES)
    beside = [torch.nextafter(ties, torch.tensor(to)) for to in (0.0, 9.0)]
    values = torch.cat((torch.tensor(x), ties, -ties, *beside))[None]
    rounded = nvfp4.fake_quantize_static(values, torch.ones(1, 1))
    expected = torch.tensor(nvfp4.E2M1_VALUES)[nvfp4.round_magnitude(values.abs())]
    assert torch.equal(rounded, torch.copysign(expected, values))


def test_what_is_no_number_stays_none() -> None:
    x = torch.full((1, 32), torch.nan)
    x[0, 16:] = 1.0
    found = nvfp4.fake_quantize(x, nvfp4.scale_of(ONE))[0].isnan()
    assert found.tolist() == [True] * 16 + [False] * 16


def test_signs_zeros_and_saturation() -> None:
    x = torch.tensor([0.0, -0.0, 0.1, -0.1, 5.0001, -5.0001, 1e30, -1e30])
    assert nvfp4.encode(x).tolist() == [0, 0, 0, 8, 7, 15, 7, 15]


def test_the_odd_element_is_in_the_high_nibble() -> None:
    assert nvfp4.pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    with pytest.raises(ValueError, match="even"):
        nvfp4.pack(torch.zeros(3, dtype=torch.uint8))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=64))
def test_packing_round_trips_every_byte(values: list[int]) -> None:
    packed = torch.tensor(values, dtype=torch.uint8)
    codes = nvfp4.unpack(packed)
    assert codes.max() <= 15
    assert torch.equal(nvfp4.pack(codes), packed)


@ROUND
@given(weights)
def test_quantizing_what_was_dequantized_changes_nothing(weight: torch.Tensor) -> None:
    """With the same global scale, where the block scale is a normal E4M3 number: only then is the largest code 6."""
    packed, scales, whole = nvfp4.quantize(weight)
    values = nvfp4.dequantize(packed, scales, whole, torch.float32)
    again = nvfp4.dequantize(*nvfp4.quantize(values, whole), torch.float32)
    assert torch.equal(again[normal(scales)], values[normal(scales)])


@ROUND
@given(weights)
def test_the_error_is_at_most_half_a_step(weight: torch.Tensor) -> None:
    """Half of the widest gap (4 to 6) is one scale; the largest values may saturate, by the scale's rounding (1/16)."""
    packed, scales, whole = nvfp4.quantize(weight)
    error = (nvfp4.dequantize(packed, scales, whole, torch.float32) - weight.float()).abs()
    step = (scales.float() * whole).repeat_interleave(nvfp4.BLOCK, dim=-1)
    amax = weight.float().unflatten(-1, (-1, nvfp4.BLOCK)).abs().amax(-1).repeat_interleave(nvfp4.BLOCK, dim=-1)
    saturated = (amax - 6 * step).clamp(min=0)
    assert bool((error <= torch.maximum(step, saturated) * (1 + 1e-5)).all())
    assert bool((saturated <= amax / 16 * (1 + 1e-5))[normal(scales)].all())


@ROUND
@given(weights)
def test_fake_quantization_equals_quantize_and_dequantize(weight: torch.Tensor) -> None:
    """Where no block is under the kernels' threshold; and there it is idempotent."""
    packed, scales, whole = nvfp4.quantize(weight.float())
    values = nvfp4.dequantize(packed, scales, whole, torch.float32)
    fake = nvfp4.fake_quantize(weight.float(), whole)
    usual = normal(scales) & (scales.float() * whole >= 1e-5).repeat_interleave(nvfp4.BLOCK, dim=-1)
    assert torch.equal(fake[usual], values[usual])
    assert torch.equal(nvfp4.fake_quantize(fake, whole)[usual], fake[usual])
    assert nvfp4.fake_quantize(weight, whole).dtype == weight.dtype


def test_activations_above_the_calibrated_range_saturate_at_it() -> None:
    """A block scale stops at 448, so nothing exceeds 6 * 448 * the global scale: the calibrated amax."""
    x = torch.full((1, 16), 1000.0)
    assert torch.equal(nvfp4.fake_quantize(x, nvfp4.scale_of(torch.tensor(10.0))), torch.full((1, 16), 10.0))


def test_blocks_too_small_for_the_kernels_become_zero() -> None:
    x = torch.full((1, 32), 2e-5)
    x[0, :16] = 1.0
    assert nvfp4.fake_quantize(x, nvfp4.scale_of(ONE))[0].tolist() == [1.0] * 16 + [0.0] * 16
    assert nvfp4.fake_quantize(torch.zeros(2, 16), torch.tensor(0.0)).abs().sum() == 0


def test_an_all_zero_block_has_scale_one() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 3] = 2.0
    packed, scales, whole = nvfp4.quantize(weight)
    assert scales.float().tolist() == [[448.0, 1.0]]
    assert torch.equal(nvfp4.dequantize(packed, scales, whole, torch.float32), weight)


def test_a_block_scale_never_rounds_to_zero() -> None:
    weight = torch.full((1, 32), 1e-9)
    weight[0, :16] = 1.0
    _, scales, _ = nvfp4.quantize(weight)
    assert scales.float().tolist() == [[448.0, 2.0**-9]]


@pytest.mark.parametrize("bad", [torch.zeros(2, 16), torch.full((1, 16), torch.nan), torch.full((1, 16), torch.inf)])
def test_a_tensor_without_a_scale_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="global scale"):
        nvfp4.quantize(bad)


def test_sizes_must_be_multiples_of_a_block() -> None:
    for function in (nvfp4.quantize, lambda x: nvfp4.fake_quantize(x, ONE), lambda x: nvfp4.block_scales(x, ONE)):
        with pytest.raises(ValueError, match="multiple of 16"):
            function(torch.ones(2, 24))
    with pytest.raises(ValueError, match="do not match"):
        nvfp4.dequantize(
            torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 2).to(torch.float8_e4m3fn), ONE, torch.float32
        )


def test_large_tensors_are_worked_on_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(1, 7, 5, torch.bfloat16, 1.0)
    whole = nvfp4.quantize(weight)
    monkeypatch.setattr(nvfp4, "_STEP", 48)
    stepped = nvfp4.quantize(weight)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, stepped, strict=True))
    assert torch.equal(nvfp4.dequantize(*whole, torch.bfloat16), nvfp4.dequantize(*stepped, torch.bfloat16))


def test_a_fused_weight_has_more_than_two_dimensions() -> None:
    weight = random_weight(2, 6, 4, torch.bfloat16, 1.0)
    flat = nvfp4.quantize(weight)
    deep = nvfp4.quantize(weight.view(2, 3, -1))
    assert deep[0].shape == (2, 3, 32)
    assert deep[1].shape == (2, 3, 4)
    assert torch.equal(deep[0].flatten(0, 1), flat[0])
    assert torch.equal(nvfp4.dequantize(*deep, torch.float32).flatten(0, 1), nvfp4.dequantize(*flat, torch.float32))


@given(st.floats(min_value=-1e4, max_value=1e4, width=32), st.sampled_from([0.25, 1.0, 3.0]))
def test_fp8_saturates_rounds_and_repeats(value: float, scale: float) -> None:
    x, factor = torch.tensor([value]), torch.tensor(scale)
    once = fp8.round_e4m3(x, factor)
    assert torch.equal(fp8.round_e4m3(once, factor), once)
    assert abs(once.item()) <= 448 * scale
    inside = min(abs(value), 448 * scale)
    assert abs(abs(once.item()) - inside) <= max(inside / 16, 2.0**-10 * scale) * (1 + 1e-6)


@pytest.fixture(scope="module")
def modelopt():  # type: ignore[no-untyped-def]
    """The quantized tensor of the installed ModelOpt, either version."""
    pytest.importorskip("modelopt")
    import modelopt.torch.quantization  # noqa: F401
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    nvfp4_tensor.fp4_compatible = lambda: False  # before 0.45 it asks CUDA, on any machine
    return nvfp4_tensor.NVFP4QTensor


@ROUND
@given(weight=weights, shared=st.sampled_from([1.0, 1.7]))
def test_the_bytes_are_modelopts(modelopt, weight: torch.Tensor, shared: float) -> None:  # type: ignore[no-untyped-def]
    whole = nvfp4.scale_of(weight.abs().amax() * shared)
    packed, scales, _ = nvfp4.quantize(weight, whole)
    theirs, their_scales, _ = modelopt.quantize(weight.clone(), nvfp4.BLOCK, weights_scaling_factor_2=whole)
    nonzero = their_scales.float() > 0  # 0.37 lets a scale round to zero, and divides by it
    assert torch.equal(scales.float()[nonzero], their_scales.float()[nonzero])
    bytes_nonzero = nonzero.repeat_interleave(nvfp4.BLOCK // 2, dim=-1)
    assert torch.equal(packed[bytes_nonzero], theirs._quantized_data[bytes_nonzero])
    assert (scales.float()[~nonzero] == nvfp4.E4M3_TINY).all()
    values = theirs.dequantize(
        dtype=weight.dtype, scale=their_scales, double_scale=whole, block_sizes={-1: nvfp4.BLOCK}
    )
    ours = nvfp4.dequantize(theirs._quantized_data, their_scales, whole, weight.dtype)
    assert torch.equal(ours, values)


@pytest.mark.parametrize("path", [*native.paths(), "torch"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_packed_bytes_are_modelopts(modelopt, path: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Also of blocks that are zero, subnormal, huge, Inf or NaN, and by the C extension."""
    from modelopt.torch.export.quant_utils import to_quantized_weight

    monkeypatch.setenv(packing.VARIABLE, path)
    values = odd(11, 64, 32, dtype)
    weight = tensor(values, dtype)
    for scale in (1 / 2688, 3e-4, 1.0, 2.0**-14):
        whole = torch.tensor(scale)
        codes, scales = packing.pack_nvfp4(values, dtype, whole.item())
        theirs, their_scales, _ = modelopt.quantize(weight.clone(), nvfp4.BLOCK, weights_scaling_factor_2=whole)
        same = (their_scales.float() != 0).numpy()  # 0.37 lets a scale round to zero, and divides by it
        numbers = same & ~their_scales.float().isnan().numpy()  # theirs may have the other sign
        np.testing.assert_array_equal(scales[numbers], raw(their_scales)[numbers])
        np.testing.assert_array_equal((scales & 0x7F)[same], (raw(their_scales) & 0x7F)[same])
        same = same.repeat(nvfp4.BLOCK // 2, axis=-1)
        np.testing.assert_array_equal(codes[same], raw(theirs._quantized_data)[same])
        inside = (weight.float().abs() <= 448 * scale).numpy()  # ModelOpt's own scales let nothing exceed it
        theirs = raw(to_quantized_weight(weight, whole.reshape(1), "fp8"))
        np.testing.assert_array_equal(packing.pack_fp8(values, dtype, whole.item())[inside], theirs[inside])


def test_the_global_scale_is_modelopts(modelopt) -> None:  # type: ignore[no-untyped-def]
    weight = random_weight(3, 3, 3, torch.bfloat16, 1.0)
    assert torch.equal(nvfp4.quantize(weight)[2], modelopt.get_weights_scaling_factor_2(weight))


@given(st.floats(min_value=-600, max_value=600, width=32), st.sampled_from([0.5, 1.0, 4.0]))
def test_fp8_is_modelopts(modelopt, value: float, scale: float) -> None:  # type: ignore[no-untyped-def]
    """Scales that are powers of two: else its 448/amax and TensorRT-LLM's 1/scale may differ in the last bit."""
    from modelopt.torch.quantization import tensor_quant

    eager = getattr(tensor_quant, "fp8_eager", None)
    if eager is None:
        pytest.skip("this ModelOpt has no eager FP8")
    x = torch.tensor([value])
    ours = fp8.round_e4m3(x, torch.tensor(scale))
    assert torch.equal(ours, eager(x, torch.tensor(448.0 * scale)))
