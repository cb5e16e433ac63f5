"""What a model family needs of the LLM class: its arguments, and the layers that it takes in BF16 alone."""

from __future__ import annotations

from typing import Any

import pytest
from model_configs import QWEN3_8B

from builder.architectures import attention, catalog, served
from builder.core.errors import UnsupportedError, UsageError
from builder.llmapi import arguments
from builder.preflight import checks
from builder.recipe import schema


def config(name: str, **more: Any) -> dict[str, Any]:
    return {**QWEN3_8B, "architectures": [name], "vocab_size": 1000, "dtype": "bfloat16", **more}


def recipe(**flags: Any) -> schema.Resolved:
    asked = {"model.id": "m", "gpu": "sm100", "target": "llmapi", "engine.tensorrt_llm": "1.3.0rc22"}
    return schema.resolve({**asked, **flags})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("Qwen3NextForCausalLM", "kv_cache_config.enable_block_reuse", False),
        ("NemotronHForCausalLM", "kv_cache_config.enable_block_reuse", False),
        ("Gemma4ForCausalLM", "attn_backend", "FLASHINFER"),
        ("Qwen3ForCausalLM", "kv_cache_config.enable_block_reuse", True),
    ],
)
def test_a_family_gets_the_arguments_that_it_needs(name: str, argument: str, value: Any) -> None:
    found = {one.name: one for one in arguments.resolve(recipe(), config(name))}[argument]
    assert found.value == value
    needed = catalog.of(config(name)).llmapi
    assert needed
    assert (found.source == needed.needs) == bool(needed.needs)


def test_asking_for_what_would_give_wrong_answers_is_a_mistake() -> None:
    asked = recipe(**{"repository.enable_kv_cache_reuse": True})
    arguments.resolve(asked, config("Qwen3ForCausalLM"))
    with pytest.raises(UsageError, match=r"enable_block_reuse must be false for Qwen3NextForCausalLM") as caught:
        arguments.resolve(asked, config("Qwen3NextForCausalLM"))
    assert caught.value.hint == "Leave repository.enable_kv_cache_reuse out."


def test_layers_that_the_loader_takes_in_bf16_alone_stay_so_with_this_target() -> None:
    known = ["model.layers.0.linear_attn.in_proj_qkv", "model.layers.0.mlp.gate_proj"]
    architecture = catalog.of(config("Qwen3_5ForCausalLM"))
    assert checks.by_family(recipe().recipe, architecture, known) == ["*.linear_attn.*"]
    assert checks.by_family(recipe().recipe, architecture, known[1:]) == []
    on_cpu = schema.resolve({"model.id": "m", "gpu": "cpu"}).recipe
    assert checks.by_family(on_cpu, architecture, known) == []


def test_a_version_or_a_key_that_the_class_does_not_serve_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"since 1\.3\.0rc22; this recipe uses 1\.2\.1") as caught:
        served.check_llmapi(config("Cohere2ForCausalLM"), "1.2.1")
    assert caught.value.hint == "--set engine.tensorrt_llm=1.3.0rc22"
    served.check_llmapi(config("Gemma4ForCausalLM", num_kv_shared_layers=0), "1.3.0rc22")
    with pytest.raises(UnsupportedError, match="with num_kv_shared_layers"):
        served.check_llmapi(config("Gemma4ForCausalLM", num_kv_shared_layers=18), "1.3.0rc22")
    with pytest.raises(UnsupportedError, match="not an architecture that the llmapi target") as caught:
        served.check_llmapi(config("GraniteForCausalLM"), "1.3.0rc22")
    assert "AutoDeploy backend alone" in caught.value.why


@pytest.mark.parametrize(
    ("more", "layers", "values"),
    [
        ({}, 36, 36 * 2 * 8 * 128),
        ({"full_attention_interval": 4}, 9, 9 * 2 * 8 * 128),  # Qwen3-Next
        ({"layer_types": ["linear_attention"] * 27 + ["full_attention"] * 9}, 9, 9 * 2 * 8 * 128),
        ({"hybrid_override_pattern": "M-M*E" * 7}, 7, 7 * 2 * 8 * 128),  # Nemotron-H
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 36, 36 * 576),  # DeepSeek-V3: one vector for all heads
        ({"layer_types": ["sliding_attention"] * 30 + ["full_attention"] * 6, "global_head_dim": 512,
          "num_global_key_value_heads": 4}, 36, 30 * 2 * 8 * 128 + 6 * 2 * 4 * 512),  # Gemma 4
        ({"num_kv_shared_layers": 10}, 26, 26 * 2 * 8 * 128),
        ({"layer_types": ["sliding_attention"] * 36, "num_kv_shared_layers": 36}, 0, 0),
        ({"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 6, "num_kv_shared_layers": 12,
          "global_head_dim": 512}, 24, 20 * 2 * 8 * 128 + 4 * 2 * 8 * 512),  # 2 of the 6 full ones share
    ],
)  # fmt: skip
def test_layers_with_a_cache_and_what_a_token_adds(more: dict[str, Any], layers: int, values: int) -> None:
    found = config("Qwen3ForCausalLM", **more)
    assert attention.attention_layers(found) == layers
    assert attention.cached_values(found) == values
    if "kv_lora_rank" in more:
        assert attention.cached_values(found, 8) == values
