"""Schemes: formats by the part of the model, from a recipe's name to the layers of a model and the plan's bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import pytest

from builder.architectures.catalog import UNKNOWN
from builder.checkpoint import layouts
from builder.core.errors import UnsupportedError, UsageError
from builder.core.safetensors_io import Tensors
from builder.formats import registry
from builder.formats.schemes import SCHEMES
from builder.llmapi import arguments
from builder.preflight import checks, memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts
from builder.quantize import exclude
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags

QWEN3 = exports.MODELS["qwen3"]
ASKED = Serving(max_batch_size=1, max_input_len=64, max_seq_len=128, max_num_tokens=128)
ATTENTION = {f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(6) for x in "qkvo"}


def facts(source: Path) -> ModelFacts:
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(source).items()}
    return ModelFacts(layouts.read_json(source / "config.json"), tensors)


def resolved(format_name: str, **more: Any) -> schema.Resolved:
    values = {"model.id": str(QWEN3), "gpu": "cpu", "quantization.format": format_name}
    return schema.resolve(values | {key.replace("__", "."): value for key, value in more.items()})


@pytest.mark.parametrize(("name", "attention"), [("nvfp4_mlp_only", "bf16"), ("nvfp4-fp8_attention", "fp8")])
def test_attention_gets_its_format_and_the_rest_that_of_most_layers(name: str, attention: str) -> None:
    asked = resolved(name)
    model = checks.keep_patterns(asked.recipe, facts(QWEN3), [])
    assert model.number_format is registry.NVFP4
    assert {one: set(modules) for one, modules in model.layers.items()} == {attention: ATTENTION}
    assert asked.recipe.quantization.title == SCHEMES[name].title
    assert asked.recipe.quantization.quant_algo == ("NVFP4" if attention == "bf16" else "MIXED_PRECISION")


def test_patterns_override_a_scheme() -> None:
    asked = resolved("nvfp4-fp8_attention", quantization__keep_bf16="*.0.self_attn.q_proj")
    model = checks.keep_patterns(asked.recipe, facts(QWEN3), [])
    first = {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}
    assert {one: set(modules) for one, modules in model.layers.items()} == {"bf16": first, "fp8": ATTENTION - first}
    asked = resolved("nvfp4_mlp_only", quantization__keep_fp8="*.self_attn.*")
    assert checks.keep_patterns(asked.recipe, facts(QWEN3), []).layers.keys() == {"fp8"}


def test_something_is_left_in_the_format_of_most_layers() -> None:
    asked = resolved("nvfp4_mlp_only", quantization__keep_bf16="*.mlp.*")
    with pytest.raises(UnsupportedError, match="No linear layer would be in NVFP4: all 42 are in BF16"):
        checks.keep_patterns(asked.recipe, facts(QWEN3), [])


def test_layers_that_are_neither_stay_in_bf16() -> None:
    """Linear attention and state spaces, as in ModelOpt's own configuration."""
    known = ["a.layers.0.linear_attn.out_proj", "a.layers.0.mlp.experts.0.down_proj", "a.layers.1.self_attn.q_proj"]
    found = exclude.assigned(SCHEMES["nvfp4-fp8_attention"], known)
    assert found == {known[0]: registry.BF16, known[2]: registry.FP8}
    with pytest.raises(UnsupportedError, match="quantizes MLPs and experts, and the model has none"):
        exclude.assigned(SCHEMES["nvfp4_mlp_only"], known[:1], UNKNOWN)


@pytest.mark.parametrize(
    ("name", "flag", "says"),
    [
        ("fp8", {"quantization__keep_fp8": "*.q_proj"}, "all its layers are in FP8"),
        ("int4_awq", {"quantization__keep_fp8": "*.q_proj"}, "would smooth those layers too"),
        ("nvfp4_attention", {}, "'nvfp4-fp8_attention'"),
    ],
)
def test_formats_that_mean_nothing_together_are_refused(name: str, flag: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(name, **flag)
    assert says in f"{caught.value.what} {caught.value.why}"


@pytest.mark.parametrize("target", ["engine", "llmapi"])
@pytest.mark.parametrize("gpu", ["sm100", "sm120"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_both_targets_serve_a_scheme_on_cards_with_nvfp4(name: str, gpu: str, target: str) -> None:
    asked, model = resolved(name, gpu=gpu, target=target), facts(QWEN3)
    config = {**model.config, "head_dim": 128}  # the tiny model's heads have no kernel on these cards
    settings = trtllm_flags.resolve(asked, config) if target == "engine" else arguments.resolve(asked, config)
    found = checks.keep_patterns(asked.recipe, model, settings)
    plain = replace(model, number_format=registry.NVFP4)
    more = [memory.sizes(one, ASKED).unified for one in (found, plain)]
    assert sum(memory.price(found, ASKED, registry.get(one)) for one in found.layers) > 0
    assert more[0] > more[1]
