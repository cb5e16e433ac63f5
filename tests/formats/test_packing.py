"""Packing and unpacking equal `formats/arithmetic` bit for bit, whatever computes them.

test_nvfp4_arithmetic.py compares with ModelOpt.
"""

from __future__ import annotations

import math
import shutil
import sysconfig
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from odd_weights import odd, raw, tensor

from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.formats.arithmetic import fp8, int8, nvfp4, nvfp4_search
from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.kernels import native, packing, tensors
from builder.formats.kernels.arrays import Array

PATHS = [*native.paths(), "torch"]
# The path of a test stays the same for all examples.
ROUND = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(ROUND, max_examples=20)
GLOBAL = (1 / 2688, 3e-4, 1.0, 1e-30, 2.0**-149, 1e30, 2.0**-14)


@pytest.fixture(autouse=True, params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on each instruction set of this CPU, and with torch."""
    monkeypatch.setenv(packing.VARIABLE, request.param)
    assert packing.path() == request.param
    return request.param


def every(dtype: str) -> Array:
    """Every value of a type of 16 bits, in order: neighbours share a block, up to Inf and NaN."""
    return np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)


matrices = st.tuples(
    st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["BF16", "F16", "F32"])
)


def check_nvfp4(values: Array, dtype: str, scale: float, rounded_to: str | None = None) -> None:
    codes, scales = packing.pack_nvfp4(values, dtype, scale, rounded_to=rounded_to)
    packed, blocks, _ = nvfp4.quantize(tensor(values, dtype, rounded_to), torch.tensor(scale))
    np.testing.assert_array_equal(scales, raw(blocks))
    np.testing.assert_array_equal(codes, raw(packed))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("scale", GLOBAL)
def test_every_value_of_16_bits_packs_as_the_arithmetic_does(dtype: str, scale: float) -> None:
    check_nvfp4(every(dtype), dtype, np.float32(scale).item())


@ROUND
@given(matrices, st.sampled_from(GLOBAL), st.sampled_from([None, "BF16", "F16", "F32"]))
def test_random_blocks_pack_as_the_arithmetic_does(
    matrix: tuple[int, int, int, str], scale: float, rounded_to: str | None
) -> None:
    check_nvfp4(odd(*matrix), matrix[3], np.float32(scale).item(), rounded_to)


def check_search(values: Array, dtype: str, scale: float, rounded_to: str | None = None) -> None:
    codes, scales = packing.search_nvfp4(values, dtype, scale, rounded_to=rounded_to)
    packed, blocks, _ = nvfp4_search.quantize(tensor(values, dtype, rounded_to), torch.tensor(scale))
    np.testing.assert_array_equal(scales, raw(blocks))
    np.testing.assert_array_equal(codes, raw(packed))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("scale", [3e-4, 1.0, 2.0**-149])
def test_scales_of_every_value_are_searched_as_the_arithmetic_does(dtype: str, scale: float) -> None:
    check_search(every(dtype), dtype, np.float32(scale).item())


@FEW
@given(matrices, st.sampled_from(GLOBAL), st.sampled_from([None, "BF16", "F16", "F32"]))
def test_scales_of_random_blocks_are_searched_as_the_arithmetic_does(
    matrix: tuple[int, int, int, str], scale: float, rounded_to: str | None
) -> None:
    check_search(odd(*matrix), matrix[3], np.float32(scale).item(), rounded_to)


@FEW
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(["BF16", "F16", "F32"]))
def test_scales_of_a_weight_are_searched_as_the_arithmetic_does(seed: int, rows: int, dtype: str) -> None:
    """Under the global scale that the writer gives it, with blocks of all sizes and some of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 48, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    weight[::3] = (weight[::3] * 4).round() / 4
    weight = weight.to(DTYPES[dtype])
    scale = nvfp4.scale_of(weight.abs().amax().clamp(min=0.1)).item()
    check_search(raw(weight), dtype, scale)


@ROUND
@given(matrices, st.sampled_from([None, "BF16", "F16"]))
def test_the_largest_magnitudes_are_torchs(matrix: tuple[int, int, int, str], rounded_to: str | None) -> None:
    values, dtype = odd(*matrix), matrix[3]
    expected = tensor(values, dtype, rounded_to).abs().amax(-1).float().numpy()
    np.testing.assert_array_equal(packing.largest_rows(values, dtype, rounded_to=rounded_to), expected)
    np.testing.assert_equal(packing.largest(values, dtype, rounded_to=rounded_to), expected.max())


@ROUND
@given(matrices, st.sampled_from([1.0, 3e-3, 1e-40, 0.0, 1e35]), st.booleans())
def test_fp8_packs_as_the_arithmetic_does(matrix: tuple[int, int, int, str], scale: float, one: bool) -> None:
    values, dtype = odd(*matrix), matrix[3]
    scales = np.full(1 if one else len(values), scale, np.float32)
    scales[::2] *= np.float32(0.7)
    expected = fp8.quantize(tensor(values, dtype), torch.from_numpy(scales)[:, None])
    np.testing.assert_array_equal(packing.pack_fp8(values, dtype, scales), raw(expected))


@ROUND
@given(matrices, st.sampled_from([None, "BF16", "F16"]), st.booleans())
def test_int8_packs_as_the_arithmetic_does(
    matrix: tuple[int, int, int, str], rounded_to: str | None, unsigned: bool
) -> None:
    values, dtype = odd(*matrix), matrix[3]
    values[tensor(values, dtype).isnan().numpy()] = 0
    weights = tensor(values, dtype, rounded_to).float()
    largest = weights.abs().amax(-1)
    scales = int8.scales_of(torch.where(largest.isinf(), 3.0, largest))
    codes = packing.pack_int8(values, dtype, scales.numpy(), rounded_to=rounded_to, unsigned=unsigned)
    expected = int8.codes(weights, scales[:, None])
    found = int8.unpack(torch.from_numpy(codes.view(np.int32))) if unsigned else torch.from_numpy(codes.view(np.int8))
    assert torch.equal(found, expected)


@ROUND
@given(st.integers(0, 2**31), st.sampled_from(GLOBAL), st.sampled_from(["BF16", "F16", "F32"]))
def test_every_code_unpacks_as_the_arithmetic_does(seed: int, scale: float, dtype: str) -> None:
    """NVFP4: all bytes under all 256 block scales. FP8: all codes. NaN may have other bits."""
    codes = np.arange(1 << 16, dtype=np.uint32).astype(np.uint8).reshape(256, 256)
    scales = np.random.default_rng(seed).integers(0, 256, (256, 32), np.uint8)
    scale = np.float32(scale).item()
    blocks = torch.from_numpy(scales).view(torch.float8_e4m3fn)
    expected = nvfp4.dequantize(torch.from_numpy(codes), blocks, torch.tensor(scale), DTYPES[dtype])
    same(packing.unpack_nvfp4(codes, scales, scale, dtype), expected, dtype)
    rows = np.linspace(0.1, 2, 256).astype(np.float32) * np.float32(scale)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    expected = fp8.dequantize(weight, torch.from_numpy(rows)[:, None], DTYPES[dtype])
    same(packing.unpack_fp8(codes, rows, dtype), expected, dtype)


def same(found: Array, expected: torch.Tensor, dtype: str) -> None:
    number = ~expected.isnan().numpy()
    np.testing.assert_array_equal(tensor(found, dtype).isnan().numpy(), ~number)
    np.testing.assert_array_equal(found[number], raw(expected)[number])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_are_dequantized_as_the_arithmetic_does(kind: torch.dtype) -> None:
    """A type that the C extension does not write goes through torch."""
    packed, blocks, whole = nvfp4.quantize(torch.randn(6, 48))
    found = tensors.dequantize_nvfp4(packed, blocks, whole, kind)
    assert found.dtype == kind
    assert torch.equal(found, nvfp4.dequantize(packed, blocks, whole, kind))
    for scale in (torch.tensor(0.013), torch.tensor([0.013]), torch.linspace(0.1, 2, 6)[:, None]):
        weight = fp8.quantize(torch.randn(6, 48), scale)
        assert torch.equal(tensors.dequantize_fp8(weight, scale, kind), fp8.dequantize(weight, scale, kind))


def test_arguments_that_do_not_fit_are_rejected() -> None:
    values = np.zeros((2, 32), np.uint16)
    with pytest.raises(ValueError, match="multiple of 16"):
        packing.pack_nvfp4(values[:, :24].copy(), "BF16", 1.0)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="global scale is"):
            packing.pack_nvfp4(values, "BF16", scale)
    with pytest.raises(ValueError, match="BF16, F16, F32"):
        packing.largest(values, "I16")
    with pytest.raises(ValueError, match="contiguous matrix"):
        packing.largest(values[:, ::2], "BF16")
    with pytest.raises(ValueError, match="contiguous matrix of 4 bytes"):
        packing.largest(values, "F32")
    with pytest.raises(ValueError, match="3 scales for 2 rows"):
        packing.pack_fp8(values, "BF16", np.ones(3, np.float32))
    for one in (np.ones(3, np.float32), np.ones(1, np.float32)):
        with pytest.raises(ValueError, match="scales for 2 rows"):
            packing.pack_int8(values, "BF16", one)
    with pytest.raises(ValueError, match="do not match"):
        packing.unpack_nvfp4(np.zeros((2, 16), np.uint8), np.zeros((2, 1), np.uint8), 1.0, "BF16")
    with pytest.raises(ValueError, match="needed a contiguous uint8"):
        packing.pack_fp8(values, "BF16", 1.0, out=np.zeros((2, 16), np.uint8))


def test_nothing_of_nothing() -> None:
    empty = np.zeros((0, 32), np.float32)
    assert packing.largest(empty, "F32") == 0.0
    assert packing.pack_nvfp4(empty, "F32", 1.0)[0].shape == (0, 16)
    assert packing.search_nvfp4(empty, "F32", 1.0)[1].shape == (0, 2)
    assert packing.pack_fp8(empty, "F32", 1.0).shape == (0, 32)
    assert packing.pack_int8(empty, "F32", np.zeros(0, np.float32)).shape == (0, 32)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_any_number_of_threads_gives_the_same_bytes(dtype: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of a few rows, and of one row for the largest magnitude."""
    monkeypatch.setattr(native, "_PART", 64)
    values = odd(7, 37, 5, dtype)
    rows = np.linspace(0.1, 2, 37).astype(np.float32)

    def everything(threads: int) -> list[Array]:
        codes, scales = packing.pack_nvfp4(values, dtype, 3e-4, threads=threads)
        eight = packing.pack_fp8(values, dtype, rows, threads=threads)
        return [
            *packing.search_nvfp4(values, dtype, 3e-4, threads=threads),
            codes,
            scales,
            eight,
            packing.largest_rows(values, dtype, threads=threads),
            np.array(packing.largest(values, dtype, threads=threads)),
            packing.unpack_nvfp4(codes, scales, 3e-4, dtype, threads=threads),
            packing.unpack_fp8(eight, rows, dtype, threads=threads),
        ]

    for one, many in zip(everything(1), everything(5), strict=True):
        np.testing.assert_array_equal(one, many)


def test_arrays_to_write_to_are_filled_and_no_byte_beside_them() -> None:
    values = odd(3, 3, 3, "BF16")
    around = np.full(3 * 24 + 2, 99, np.uint8)
    inside = around[1:-1].reshape(3, 24)
    scales = np.zeros((3, 3), np.uint8)
    codes, _ = packing.pack_nvfp4(values, "BF16", 1e-3, out=(inside, scales))
    assert np.shares_memory(codes, around)
    assert around[0] == around[-1] == 99
    np.testing.assert_array_equal(inside, packing.pack_nvfp4(values, "BF16", 1e-3)[0])


def test_a_read_only_mapping_at_any_address_is_read(tmp_path: Path) -> None:
    """Tensors in a safetensors file begin at any byte."""
    values = odd(5, 4, 2, "F32")
    (tmp_path / "file").write_bytes(b"xyz" + values.tobytes())
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")[3:].view(np.uint32).reshape(values.shape)
    for found, expected in zip(
        packing.pack_nvfp4(mapped, "F32", 1e-3), packing.pack_nvfp4(values, "F32", 1e-3), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_an_unknown_path_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packing.VARIABLE, "sse9")
    with pytest.raises(UsageError, match=r"BUILDER_KERNELS is 'sse9', and here it can be .*torch"):
        packing.largest(np.zeros((1, 16), np.uint16), "BF16")


def test_without_compiler_and_torch_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "the C extension is not compiled")
    monkeypatch.setattr(native, "paths", list)
    monkeypatch.setattr(packing, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="neither is here") as caught:
        packing.largest(np.zeros((1, 16), np.uint16), "BF16")
    assert "not compiled" in caught.value.why
    assert "quantize extra" in caught.value.hint


@pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="no C compiler or no headers of Python, so the extension can't be built here",
)
def test_the_extension_is_built_from_this_source() -> None:
    """If this fails: `pip install --no-deps -e .` compiles it."""
    assert native.missing() == ""


def test_an_extension_of_another_source_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "source_digest", lambda: "another")
    native.missing.cache_clear()
    try:
        assert native.paths() == []
        assert "older than its source" in native.missing() or native._native is None
    finally:
        native.missing.cache_clear()


def test_the_slow_path_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "missing", lambda: "")
    packing.warn_if_slow(Output("human"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(native, "missing", lambda: "the C extension is older than its source")
    packing.warn_if_slow(Output("human"))
    warned = capsys.readouterr().err
    assert "several times more slowly: the C extension is older than its source. Install" in warned
