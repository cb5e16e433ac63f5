"""The search for block scales finds what trying all of them finds, and what ModelOpt's sweep finds."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from builder.formats.arithmetic import nvfp4, nvfp4_search
from builder.quantize import simulation

KINDS = ("normal", "heavy", "sparse", "grid", "bf16", "equal")
ROUND = settings(max_examples=25, deadline=None)


def blocks(kind: str, seed: int, count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    if kind == "heavy":
        x /= torch.rand(count, 16, generator=generator).clamp(min=1e-3)
    if kind == "sparse":
        x *= torch.rand(count, 16, generator=generator) < 0.15
    if kind == "grid":  # as in a model that was made from a 4-bit file
        x = (x * 2).round() * torch.rand(count, 1, generator=generator)
    if kind == "bf16":
        x = x.bfloat16().float()
    if kind == "equal":
        x = x[:, :1].expand(-1, 16).contiguous()
    return x * torch.randn(count, 1, generator=generator).exp()


def exhaustive(x: Tensor, scale: Tensor, hessians: Tensor | None = None) -> Tensor:
    """The codes of the scales by trying all 126, as ModelOpt does: the first of the best, from small to large."""
    losses = []
    for code in range(1, 127):
        block_scale = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = x / scale
        near = nvfp4_search._errors(values.abs(), block_scale.expand(len(x))) * values.sign()
        if hessians is None:
            losses.append(nvfp4_search._squared(near))
        else:
            each = near.view(-1, len(hessians), 16)
            losses.append(torch.einsum("rmi,mij,rmj->rm", each.double(), hessians.double(), each.double()).flatten())
    return torch.stack(losses).argmin(0) + 1


@ROUND
@given(st.sampled_from(KINDS), st.integers(0, 2**31))
def test_leaving_out_scales_changes_nothing(kind: str, seed: int) -> None:
    x = blocks(kind, seed)
    scale = nvfp4.scale_of(x.abs().amax())
    found = nvfp4_search.search(x, scale).view(torch.uint8).long()
    assert torch.equal(found, exhaustive(x, scale))


@ROUND
@given(st.sampled_from(KINDS), st.integers(0, 2**31))
def test_the_error_is_at_most_that_of_the_largest_magnitude(kind: str, seed: int) -> None:
    x = blocks(kind, seed)
    scale = nvfp4.scale_of(x.abs().amax())
    by_max = nvfp4.dequantize(*nvfp4.quantize(x, scale), torch.float32)
    by_search = nvfp4.dequantize(*nvfp4_search.quantize(x, scale), torch.float32)
    errors = ((x - by_search) ** 2).sum(-1), ((x - by_max) ** 2).sum(-1)
    assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all())


def test_an_identity_as_hessian_is_the_squared_error() -> None:
    x = blocks("normal", 3, 480)
    scale = nvfp4.scale_of(x.abs().amax())
    same = nvfp4_search.search(x, scale, torch.eye(16).expand(6, 16, 16).contiguous())
    assert torch.equal(same.view(torch.uint8), nvfp4_search.search(x, scale).view(torch.uint8))


def test_hessians_weigh_the_blocks_of_their_inputs() -> None:
    x = blocks("heavy", 4, 480)
    scale = nvfp4.scale_of(x.abs().amax())
    inputs = torch.randn(6, 64, 16) * torch.rand(6, 1, 16) * 5
    hessians = inputs.transpose(1, 2) @ inputs
    found = nvfp4_search.search(x, scale, hessians).view(torch.uint8).long()
    best = exhaustive(x, scale, hessians)
    assert (found == best).float().mean() > 0.99, "sums in another order may differ where two scales are as good"
    assert (found != nvfp4_search.search(x, scale).view(torch.uint8)).float().mean() > 0.1


def test_zeros_nan_and_inf() -> None:
    x = torch.zeros(4, 16)
    x[1, 3], x[2, 5], x[3, 0] = torch.nan, torch.inf, 1.0
    found = nvfp4_search.search(x, torch.tensor(1 / 2688)).view(torch.uint8)
    assert found[:3].tolist() == [1, 126, 126]
    assert nvfp4_search.quantize(x[:1], torch.tensor(1.0))[0].count_nonzero() == 0


def losses(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The squared errors of blocks under scales, computed in float64, as shares of the blocks' squares."""
    factors = (codes.view(torch.float8_e4m3fn).float() * scale)[:, None].double()
    apart = (x.double().abs() / factors)[..., None] - torch.tensor(nvfp4.E2M1_VALUES, dtype=torch.float64)
    return ((apart.abs().amin(-1) * factors) ** 2).sum(-1) / (x.double() ** 2).sum(-1).clamp(min=1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_modelopts_sweep_finds_the_same_scales(kind: str) -> None:
    """On its path for CPUs. Of two scales that are equally good it takes either, and we the smaller."""
    mse = pytest.importorskip("modelopt.torch.quantization.calib.mse")
    if not hasattr(mse, "NVFP4MSECalibrator"):
        pytest.skip("this ModelOpt has no sweep of E4M3 scales")
    x = blocks(kind, 11, 4000)
    whole = x.abs().amax()
    calibrator = mse.NVFP4MSECalibrator(
        amax=x.abs().amax(-1, keepdim=True),
        global_amax=whole,
        axis=0,
        quant_func=lambda values, amax: simulation._static_block(values, amax, whole),
    )
    calibrator.collect(x)
    theirs = (calibrator.compute_amax().flatten() / whole * 448).to(torch.float8_e4m3fn).view(torch.uint8)
    ours = nvfp4_search.search(x, nvfp4.scale_of(whole)).view(torch.uint8)
    loss = [losses(x, codes, nvfp4.scale_of(whole)) for codes in (ours, theirs)]
    torch.testing.assert_close(*loss, rtol=0, atol=1e-7)
    if kind in ("normal", "bf16"):
        assert (ours != theirs).float().mean() < 1e-3
    assert bool((ours <= theirs)[loss[0] == loss[1]].all())
