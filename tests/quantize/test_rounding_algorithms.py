"""GPTQ and the search of block scales by Hessians, against direct computation in float64 and their properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builder.formats.arithmetic import nvfp4
from builder.quantize.algorithms import block_scales, gptq, hessian
from builder.quantize.algorithms.grids import Nvfp4Blocks
from builder.quantize.algorithms.moments import Moments
from tests.support import peak_memory

BLOCK = nvfp4.BLOCK


def options(**values: Any) -> gptq.Options:
    return gptq.Options(**{"scales": "max", "damping": 0.01, "order": "none", "block_size": 128, **values})


def problem(seed: int, inputs: int = 64, rows: int = 24, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the mean X^T X of correlated inputs with a few large columns, and the weight's global scale."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mixed
    x[:, ::17] *= 6
    weight = torch.randn(rows, inputs, generator=generator) * 0.05
    return weight, x.T @ x / tokens, nvfp4.scale_of(weight.abs().amax())


def blocks_of(matrix: Tensor) -> Tensor:
    return torch.stack([matrix[i : i + BLOCK, i : i + BLOCK] for i in range(0, len(matrix), BLOCK)])


def gptq_of(weight: Tensor, matrix: Tensor, scale: Tensor, **values: Any) -> tuple[Tensor, Tensor]:
    factored = gptq.factor(matrix.clone(), options(**values))
    assert factored is not None
    return gptq.round_rows(weight, factored, Nvfp4Blocks(scale), options(**values))


def loss(weight: Tensor, matrix: Tensor, scale: Tensor, made: tuple[Tensor, Tensor]) -> float:
    """tr(E H E^T): the squared error of the layer's outputs."""
    error = (nvfp4.dequantize(*made, scale, torch.float32) - weight).double()
    return float((error @ matrix.double() * error).sum())


def plain(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales, _ = nvfp4.quantize(weight, scale)
    return codes, scales


def direct(weight: Tensor, matrix: Tensor, scale: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """GPTQ as its paper derives it, in float64: after each column the error goes to those that follow by the inverse of
    what is left of the Hessian."""
    left, damped = weight.double().clone(), matrix.double()
    damped = damped + damping * damped.diagonal().mean() * torch.eye(len(matrix))
    codes, scales = torch.empty(weight.shape, dtype=torch.uint8), []
    for column in range(weight.shape[1]):
        if column % BLOCK == 0:
            scales.append(nvfp4.block_scales(left[:, column : column + BLOCK].float(), scale)[:, 0])
        step = (scales[-1].float() * scale).double()
        codes[:, column] = nvfp4.encode((left[:, column] / step).float())
        near = torch.tensor(nvfp4.E2M1_VALUES)[(codes[:, column] & 7).long()] * torch.where(codes[:, column] > 7, -1, 1)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = (left[:, column] - near * step) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return nvfp4.pack(codes), torch.stack(scales, 1)


@pytest.mark.parametrize("seed", range(4))
def test_gptq_equals_its_derivation_in_float64(seed: int) -> None:
    weight, matrix, scale = problem(seed)
    found, expected = gptq_of(weight, matrix, scale), direct(weight, matrix, scale, 0.01)
    same = (nvfp4.unpack(found[0]) == nvfp4.unpack(expected[0])).float().mean()
    assert same > 0.99  # a value at a boundary may fall to the other side in float32
    assert loss(weight, matrix, scale, found) == pytest.approx(loss(weight, matrix, scale, expected), rel=0.02)
    assert loss(weight, matrix, scale, found) < 0.8 * loss(weight, matrix, scale, plain(weight, scale))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["max", "mse", "hessian"]), st.sampled_from(["none", "activation"]))
def test_gptq_leaves_less_error_than_rounding_with_the_same_scales(seed: int, scales: str, order: str) -> None:
    weight, matrix, scale = problem(seed)
    made = gptq_of(weight, matrix, scale, scales=scales, order=order)
    rounded = plain(weight, scale)
    if scales == "hessian":
        rounded = hessian.round_rows(weight, blocks_of(matrix), scale)
    elif scales == "mse":
        rounded = hessian.round_rows(weight, torch.eye(BLOCK).expand(4, BLOCK, BLOCK), scale)
    assert loss(weight, matrix, scale, made) < loss(weight, matrix, scale, rounded)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_hessian_scales_leave_no_more_error_in_any_block_than_largest_magnitudes(seed: int) -> None:
    weight, matrix, scale = problem(seed)
    errors = []
    for made in (hessian.round_rows(weight, blocks_of(matrix), scale), plain(weight, scale)):
        error = (nvfp4.dequantize(*made, scale, torch.float32) - weight).view(len(weight), -1, BLOCK)
        errors.append(torch.einsum("rbi,bij,rbj->rb", error, blocks_of(matrix), error))
    assert bool((errors[0] <= errors[1] * (1 + 1e-4) + 1e-9).all())
    assert errors[0].sum() < 0.95 * errors[1].sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_hessian_codes_leave_no_more_error_in_any_block_than_nearest_ones(seed: int) -> None:
    weight, matrix, scale = problem(seed)
    codes, scales = hessian.round_rows(weight, blocks_of(matrix), scale)
    step = (scales.float() * scale).repeat_interleave(BLOCK, 1)
    nearest = nvfp4.pack(nvfp4.encode(weight / step))
    assert not torch.equal(codes, nearest)
    errors = []
    for made in (codes, nearest):
        error = (nvfp4.dequantize(made, scales, scale, torch.float32) - weight).view(len(weight), -1, BLOCK)
        errors.append(torch.einsum("rbi,bij,rbj->rb", error, blocks_of(matrix), error))
    assert bool((errors[0] <= errors[1] * (1 + 1e-4) + 1e-9).all())
    assert errors[0].sum() < 0.97 * errors[1].sum()


@given(st.integers(0, 1000), st.sampled_from(["none", "activation"]))
@settings(max_examples=20, deadline=None)
def test_without_correlation_gptq_is_rounding(seed: int, order: str) -> None:
    """Inputs of different sizes, none correlated: nothing can be corrected, in whatever order."""
    weight, _, scale = problem(seed)
    sizes = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.1)
    for rule, expected in (
        ("max", plain(weight, scale)),
        ("mse", hessian.round_rows(weight, torch.eye(BLOCK).expand(4, BLOCK, BLOCK), scale)),
    ):
        for found, other in zip(gptq_of(weight, sizes, scale, scales=rule, order=order), expected, strict=True):
            assert torch.equal(found.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("order", ["none", "activation"])
def test_the_number_of_columns_at_a_time_hardly_changes_the_result(order: str) -> None:
    weight, matrix, scale = problem(7, inputs=320)
    losses = [
        loss(weight, matrix, scale, gptq_of(weight, matrix, scale, order=order, block_size=size))
        for size in (16, 128, 4096)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.02)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, matrix, scale = problem(3)
    whole = gptq_of(weight, matrix, scale, scales="hessian")
    again = gptq_of(weight, matrix, scale, scales="hessian")
    part = gptq_of(weight[:8], matrix, scale, scales="hessian")
    assert all(torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(whole, again, strict=True))
    assert torch.equal(whole[0][:8], part[0])


def test_columns_without_input_are_rounded_as_they_are() -> None:
    weight, matrix, scale = problem(1)
    matrix[16:32] = 0
    matrix[:, 16:32] = 0
    codes, scales = gptq_of(weight, matrix, scale)
    expected_codes, expected_scales = plain(weight, scale)
    assert torch.equal(codes[:, 8:16], expected_codes[:, 8:16])
    assert torch.equal(scales[:, 1].float(), expected_scales[:, 1].float())


@pytest.mark.parametrize("dead", [slice(16, 32), slice(0, 64)])
def test_blocks_without_input_are_searched_for_the_least_squared_error(dead: slice) -> None:
    weight, matrix, scale = problem(1)
    matrix[dead] = 0
    matrix[:, dead] = 0
    codes, scales = hessian.round_rows(weight, blocks_of(matrix), scale)
    expected_codes, expected_scales = hessian.round_rows(weight, torch.eye(BLOCK).expand(4, BLOCK, BLOCK), scale)
    block = slice(dead.start // BLOCK, dead.stop // BLOCK)
    assert torch.equal(scales[:, block].float(), expected_scales[:, block].float())
    assert torch.equal(nvfp4.unpack(codes)[:, dead], nvfp4.unpack(expected_codes)[:, dead])


FACTORS = """
import torch
from builder.quantize.algorithms import gptq
options = gptq.Options("hessian", 0.05, "activation", 128)
gptq.factor(torch.eye(512), options)
rows = torch.randn(64, 2048)
before = peak()
gptq.factor(rows.T @ rows, options)
"""


def test_factoring_holds_three_matrices_and_a_workspace() -> None:
    # Measured: 4.0 to 4.1 matrices, so a workspace as large as one; 5.07 a few times on a busy machine.
    assert peak_memory.growth(FACTORS) < 5.2 * 4 * 2048**2


def test_damping_is_raised_until_a_singular_hessian_can_be_factored() -> None:
    weight, _, scale = problem(2)
    x = torch.randn(3, 64)
    matrix = x.T @ x
    factored = gptq.factor(matrix.clone(), options(damping=1e-9))
    assert factored is not None
    assert factored.damping > 1e-9
    made = gptq.round_rows(weight, factored, Nvfp4Blocks(scale), options())
    assert bool(torch.isfinite(nvfp4.dequantize(*made, scale, torch.float32)).all())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_hessian_without_finite_diagonal_has_no_factor(value: float) -> None:
    assert gptq.factor(torch.full((32, 32), value), options()) is None


def test_a_block_of_zeros_keeps_the_scale_of_the_largest_magnitude() -> None:
    weight, matrix, scale = problem(4)
    weight[:, :16] = 0
    assert bool((block_scales.by_error(weight[:, :16].T, scale, matrix[:16, :16]).float() == 1).all())


@pytest.mark.parametrize("inputs", [16, 48, 1040])
def test_moments_equal_the_product_of_all_rows(inputs: int) -> None:
    batches = [torch.randn(2, count, inputs) for count in (1, 7, 30)]
    rows = torch.cat([batch.reshape(-1, inputs) for batch in batches]).double()
    expected = rows.T @ rows / len(rows)
    for blocks in (False, True):
        seen = Moments({"layer": inputs}, blocks=blocks)
        for batch in batches:
            seen.add("layer", batch)
            seen.add("another", batch)
            seen.add("layer", torch.randn(3, inputs + 1))
        assert seen.tokens == {"layer": len(rows)}
        found = seen.take("layer")
        assert found is not None
        assert torch.allclose(found.double(), blocks_of(expected) if blocks else expected, atol=1e-4)
        assert seen.take("layer") is None
