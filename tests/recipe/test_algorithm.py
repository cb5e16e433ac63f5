"""quantization.algorithm: which formats and values it goes with, and what messages say where it does not."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from builder.core.errors import UsageError
from builder.formats import algorithms, registry
from builder.recipe import schema
from builder.recipe.algorithm import AlgorithmName, Gptq

MODEL = {"model.id": "org/model", "gpu": "cpu"}


def asked(**more: Any) -> schema.Resolved:
    return schema.resolve({**MODEL, **{f"quantization.{key}": value for key, value in more.items()}})


def test_every_algorithm_has_a_name_in_recipes() -> None:
    assert list(get_args(AlgorithmName)) == list(algorithms.ALGORITHMS)


def test_max_is_the_default_and_goes_with_every_format() -> None:
    for one in registry.for_whole_model():
        assert asked(format=one.name).recipe.quantization.rounding == {"algorithm": "max"}


def test_algorithms_treat_what_has_block_scales_of_e4m3_and_gptq_int8_too() -> None:
    found = {one.name: [other.name for other in algorithms.treated(one)] for one in registry.for_whole_model()}
    assert {name: treated for name, treated in found.items() if treated} == {
        **{name: ["mse", "hessian", "gptq"] for name in ("nvfp4", "w4a16_nvfp4")},
        **{name: ["gptq"] for name in ("int8_static", "int8_dynamic", "w8a16_int8")},
    }


@pytest.mark.parametrize(("name", "format_name"), [("hessian", "nvfp4"), ("gptq", "nvfp4"), ("gptq", "w8a16_int8")])
def test_what_reads_rows_is_refused_without_them(name: str, format_name: str) -> None:
    instead = "max" if format_name == "w8a16_int8" else "mse"
    values = {"quantization.algorithm": name, "quantization.format": format_name, "calibration.samples": 0}
    with pytest.raises(UsageError, match=f"use algorithm {instead}, or name rows"):
        schema.resolve({**MODEL, **values})


@pytest.mark.parametrize(
    ("format_name", "said"),
    [
        ("fp8", "quantization: algorithm mse chooses the block scales of NVFP4, and format fp8 has none"),
        ("int4_awq", "quantization: format int4_awq has an algorithm of its own"),
        ("nvfp4_awq", "format nvfp4_awq has an algorithm of its own"),
        ("bf16", "and format bf16 has none"),
    ],
)
def test_formats_without_block_scales_are_refused(format_name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked(format=format_name, kv_cache_dtype="auto", algorithm="mse")


def test_int8_takes_gptq_and_names_it_where_others_are_refused() -> None:
    for name in ("mse", "hessian"):
        with pytest.raises(UsageError, match="format int8_dynamic has none; use algorithm gptq, or leave it out"):
            asked(format="int8_dynamic", algorithm=name)
    with pytest.raises(UsageError, match="algorithm gptq rounds NVFP4 and INT8, and format fp8 has neither"):
        asked(format="fp8", algorithm="gptq")
    part = asked(format="int8_dynamic", algorithm="gptq").recipe.quantization
    assert part.rounding == {"algorithm": "gptq", "gptq": Gptq().model_dump()}


@pytest.mark.parametrize("format_name", ["nvfp4", "nvfp4_mlp_only", "nvfp4-fp8_attention", "w4a16_nvfp4"])
def test_formats_with_block_scales_are_searched(format_name: str) -> None:
    part = asked(format=format_name, algorithm="mse", keep_fp8=["*.down_proj"]).recipe.quantization
    assert part.rounding == {"algorithm": "mse"}


@pytest.mark.parametrize("size", [24, 8, 0])
def test_gptq_takes_whole_blocks_of_columns(size: int) -> None:
    with pytest.raises(UsageError, match=r"gptq\.block_size"):
        schema.resolve(MODEL, sets=[f"quantization.gptq.block_size={size}"])


def test_the_values_of_gptq_are_in_keys_and_jobs() -> None:
    values = {"scales": "hessian", "damping": 0.02, "order": "activation", "block_size": 128}
    resolved = schema.resolve({**MODEL, "quantization.algorithm": "gptq"}, sets=["quantization.gptq.damping=0.02"])
    assert resolved.recipe.quantization.rounding == {"algorithm": "gptq", "gptq": values}


def test_values_of_another_algorithm_are_refused() -> None:
    with pytest.raises(UsageError, match="values of gptq have no effect with algorithm max"):
        schema.resolve(MODEL, sets=["quantization.gptq.damping=0.02"])


@pytest.mark.parametrize(("inputs", "least"), [(64, 256), (512, 256), (513, 257), (12288, 6144)])
def test_gptq_needs_half_as_many_tokens_as_inputs_and_never_few(inputs: int, least: int) -> None:
    assert algorithms.GPTQ.least_tokens(inputs) == least
    assert algorithms.HESSIAN.least_tokens(inputs) == algorithms.BLOCK
    assert algorithms.MSE.least_tokens(inputs) == 0


def test_the_preset_accuracy_rounds_by_gptq_with_its_defaults() -> None:
    part = schema.resolve(MODEL, preset="accuracy").recipe.quantization
    assert (part.format, part.algorithm, part.gptq) == ("nvfp4", "gptq", Gptq())
    part = schema.resolve({**MODEL, "quantization.format": "w4a16_nvfp4"}, preset="accuracy").recipe.quantization
    assert (part.format, part.algorithm) == ("w4a16_nvfp4", "gptq")
