"""GPTQ of INT8 with a scale for each output, against direct computation in float64 and its properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builder.formats import registry
from builder.formats.arithmetic import int8
from builder.formats.int8_dynamic import Int8
from builder.quantize.algorithms import gptq
from builder.quantize.algorithms.grids import SHRUNK, Int8Rows


def format_of(name: str) -> Int8:
    one = registry.get(name)
    assert isinstance(one, Int8)
    return one


DYNAMIC, WEIGHTS = format_of("int8_dynamic"), format_of("w8a16_int8")
GRID = Int8Rows(DYNAMIC, torch.bfloat16)


def options(**values: Any) -> gptq.Options:
    return gptq.Options(**{"scales": "max", "damping": 0.01, "order": "none", "block_size": 128, **values})


def problem(seed: int, inputs: int = 64, rows: int = 24, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight with some large values, and the mean X^T X of correlated inputs with a few large columns."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mixed
    x[:, ::17] *= 6
    weight = torch.randn(rows, inputs, generator=generator) * 0.05
    weight[::3, 5] *= 8
    return weight, x.T @ x / tokens


def gptq_of(weight: Tensor, matrix: Tensor, grid: Int8Rows = GRID, **values: Any) -> tuple[Tensor, Tensor]:
    factored = gptq.factor(matrix.clone(), options(**values))
    assert factored is not None
    return gptq.round_rows(weight, factored, grid, options(**values))


def plain(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = int8.scales_of(weight.abs().amax(-1))
    return int8.codes(weight, scales[:, None]), scales


def loss(weight: Tensor, matrix: Tensor, made: tuple[Tensor, Tensor]) -> float:
    """tr(E H E^T): the squared error of the layer's outputs."""
    error = (int8.dequantize(*made, torch.float32) - weight).double()
    return float((error @ matrix.double() * error).sum())


def direct(weight: Tensor, matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """GPTQ as its paper derives it, in float64."""
    left, damped = weight.double().clone(), matrix.double()
    damped = damped + damping * damped.diagonal().mean() * torch.eye(len(matrix))
    scales = int8.scales_of(weight.abs().amax(-1))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for column in range(weight.shape[1]):
        codes[:, column] = int8.codes(left[:, column], scales)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = (left[:, column] - codes[:, column] * scales.double()) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return codes, scales


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_its_derivation_in_float64(seed: int) -> None:
    weight, matrix = problem(seed)
    found, expected = gptq_of(weight, matrix), direct(weight, matrix, 0.01)
    assert torch.equal(found[1], expected[1])
    assert (found[0] == expected[0]).float().mean() > 0.99  # a value at a boundary may fall to the other side
    assert loss(weight, matrix, found) == pytest.approx(loss(weight, matrix, expected), rel=0.02)
    assert loss(weight, matrix, found) < 0.8 * loss(weight, matrix, plain(weight))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["max", "mse", "hessian"]), st.sampled_from(["none", "activation"]))
def test_it_leaves_less_error_than_rounding(seed: int, scales: str, order: str) -> None:
    weight, matrix = problem(seed)
    assert loss(weight, matrix, gptq_of(weight, matrix, scales=scales, order=order)) < loss(
        weight, matrix, plain(weight)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["none", "activation"]))
def test_without_correlation_it_is_rounding(seed: int, order: str) -> None:
    """As the formats' own packing has it: the same codes and scales, in the bytes that are stored."""
    weight, _ = problem(seed)
    weight = weight.bfloat16().float()
    sizes = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.1)
    bits = weight.bfloat16().view(torch.int16).numpy()
    for one in (DYNAMIC, WEIGHTS):
        packed = one.pack(bits, "BF16", 1.0, rounded_to="BF16")
        codes, scales = gptq_of(weight, sizes, Int8Rows(one, torch.bfloat16), order=order)
        assert codes.view(torch.uint8).numpy().tobytes() == packed["weight"].tobytes()
        assert scales.numpy().tobytes() == packed["weight_scale"].tobytes()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_a_searched_scale_leaves_no_more_error_than_any_other_that_was_tried(seed: int) -> None:
    weight, _ = problem(seed)
    weight[1] = 0
    _, found = gptq_of(weight, torch.eye(64), scales="mse")
    largest = weight.abs().amax(-1)

    def errors(scales: Tensor) -> Tensor:
        return (int8.round_trip(weight, scales[:, None]) - weight).square().sum(-1)

    for share in SHRUNK:
        assert bool((errors(found) <= errors(int8.scales_of(largest * share)) * (1 + 1e-4) + 1e-12).all())
    assert found[1] == int8.scales_of(torch.tensor(0.0))


def test_scales_of_packed_weights_are_numbers_of_the_model_s_type_when_they_are_searched() -> None:
    weight, matrix = problem(5)
    for rule in ("max", "mse", "hessian"):
        codes, scales = gptq_of(weight, matrix, Int8Rows(WEIGHTS, torch.bfloat16), scales=rule)
        assert (codes.dtype, codes.shape) == (torch.int32, (24, 16))
        assert torch.equal(scales, scales.bfloat16().float())


def test_rows_do_not_depend_on_each_other() -> None:
    weight, matrix = problem(3)
    whole, part = (gptq_of(rows, matrix, scales="hessian", order="activation") for rows in (weight, weight[:8]))
    assert torch.equal(whole[0][:8], part[0])
    assert torch.equal(whole[1][:8], part[1])
