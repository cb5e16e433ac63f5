"""What a quantized checkpoint is, from its configuration and headers: real exports, and what published ones say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from builder.checkpoint import description
from builder.checkpoint.description import Description, describe, describe_directory
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import TensorInfo
from builder.formats import kv_cache
from builder.formats.registry import BF16, FP8, NVFP4

CONFIG = json.loads((Path(__file__).parents[1] / "data/tiny-qwen3/config.json").read_text())
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
MODULES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in PROJECTIONS]
MODELOPT = {"name": "modelopt", "version": "0.33.0"}
# nvidia/Qwen3-32B-NVFP4, hf_quant_config.json (ai-dynamo/aiconfigurator, model_configs/@f577ab84).
PUBLISHED = {
    "producer": MODELOPT,
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    },
}
# quantization_config as ModelOpt 0.37 to 0.47 make it of that (export/convert_hf_config.py).
BLOCK = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": MODELOPT,
    "quant_method": "modelopt",
}


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, 0)


def headers(quantized: Mapping[str, str] | None = None, prefix: str = "") -> dict[str, TensorInfo]:
    """Weights of all linear layers, in NVFP4 unless named here with another dtype, with the scales of the KV cache."""
    found = {f"{prefix}model.norm.weight": info("BF16", 64), "lm_head.weight": info("BF16", 100, 64)}
    for module in MODULES:
        dtype = (quantized or {}).get(module, "U8")
        found[f"{prefix}{module}.weight"] = info(dtype, 64, 32 if dtype == "U8" else 64)
    for layer in range(2):
        attention = f"{prefix}model.layers.{layer}.self_attn"
        found |= {f"{attention}.k_proj.k_scale": info("F32"), f"{attention}.v_proj.v_scale": info("F32")}
    return found


def documents(hf: Any = PUBLISHED, block: Any = None, **more: Any) -> dict[str, Any]:
    config = {**CONFIG, **({"quantization_config": block} if block else {})}
    return {"config.json": config, **({"hf_quant_config.json": hf} if hf else {}), **more}


def quantization(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED, "quantization": {**PUBLISHED["quantization"], **changes}}  # type: ignore[dict-item]


def formats(found: Description) -> dict[str, str]:
    return {module: one.name for module, one in found.layers.items()}


@pytest.mark.parametrize(
    ("hf", "block"),
    [
        (PUBLISHED, None),
        (None, BLOCK),
        (PUBLISHED, BLOCK),
        (None, {"quant_method": "modelopt", **PUBLISHED}),
        (quantization(quant_algo="nvfp4"), None),
        (quantization(group_size=None), BLOCK),
    ],
    ids=["hf_quant_config", "flat", "both", "nested", "small letters", "no group size"],
)
def test_each_place_says_the_same(hf: Any, block: Any) -> None:
    found = describe(documents(hf, block), headers())
    assert (found.layout, found.formats.default, found.cache) == ("unified", NVFP4, kv_cache.FP8)
    assert found.contradictions == ()
    assert str(found.producer) == "modelopt 0.33.0"
    assert set(formats(found)) == set(MODULES)
    assert set(formats(found).values()) == {"nvfp4"}
    assert found.served_cache is kv_cache.FP8


@pytest.mark.parametrize(
    "entry",
    [
        "model.layers.0.self_attn",
        "model.layers.0.self_attn*",
        "model.layers.0.self_attn.*",
        "layers.0.self_attn.*_proj",
        r"re:.*layers\.0\.self_attn\.[qkvo]_proj$",
        "language_model.model.layers.0.self_attn*",
    ],
)
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_an_entry_names_modules_exactly_by_a_wildcard_or_by_what_contains_them(entry: str, prefix: str) -> None:
    kept = {f"model.layers.0.self_attn.{name}_proj": "BF16" for name in "qkvo"}
    found = describe(documents(quantization(exclude_modules=["lm_head", entry])), headers(kept, prefix))
    assert found.contradictions == ()
    assert {name.removeprefix(prefix) for name, one in found.layers.items() if one is BF16} == set(kept)
    assert found.formats.of(f"{prefix}model.layers.0.self_attn.q_proj") is BF16
    assert found.formats.of(f"{prefix}model.layers.1.self_attn.q_proj") is NVFP4


def test_a_fused_name_means_all_layers_that_are_fused_to_it() -> None:
    kept = {f"model.layers.0.self_attn.{name}_proj": "BF16" for name in "qkv"}
    found = describe(documents(quantization(exclude_modules=["model.layers.0.self_attn.qkv_proj"])), headers(kept))
    assert {name for name, one in found.layers.items() if one is BF16} == set(kept)


MIXED = {module: {"quant_algo": "FP8"} for module in MODULES if "self_attn" in module} | {
    module: {"quant_algo": "NVFP4", "group_size": 16} for module in MODULES if "mlp" in module
}
FP8_ATTENTION = {module: "F8_E4M3" for module in MODULES if "self_attn" in module}


@pytest.mark.parametrize("where", ["hf_quant_config", "quant_cfg", "block"])
def test_layers_of_mixed_precision_are_listed_in_one_of_three_files(where: str) -> None:
    mixed = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}
    block = {**mixed, "quant_method": "modelopt", "kv_cache_scheme": BLOCK["kv_cache_scheme"]}
    listed = {**mixed, "quantized_layers": MIXED}
    hf = {"producer": MODELOPT, "quantization": listed if where == "hf_quant_config" else mixed}
    # 0.37 writes no layers into config.json, 0.47 does.
    files = documents(hf, {**block, "quantized_layers": MIXED} if where == "block" else block)
    if where == "quant_cfg":
        files["quant_cfg.json"] = listed
    found = describe(files, headers(FP8_ATTENTION))
    assert found.contradictions == ()
    assert found.formats.default is None
    assert {name for name, one in found.layers.items() if one is FP8} == set(FP8_ATTENTION)


def test_mixed_precision_without_a_list_is_incomplete() -> None:
    with pytest.raises(IntegrityError, match="lists no layers") as raised:
        describe(documents(quantization(quant_algo="MIXED_PRECISION")), headers())
    assert "quant_cfg.json" in raised.value.why


def test_an_entry_for_experts_means_all_of_them() -> None:
    expert = "model.layers.0.mlp.experts.3.down_proj"
    mixed = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}},
    }
    found = describe(documents(quantization(**mixed)), {**headers(), f"{expert}.weight": info("U8", 64, 32)})
    assert found.formats.of(expert) is NVFP4
    assert found.formats.of("model.layers.0.mlp.gate") is BF16


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            documents(quantization(kv_cache_quant_algo=None), BLOCK),
            "kv_cache_quant_algo None, and config.json says FP8",
        ),
        (documents(quantization(exclude_modules=["*.self_attn*"]), BLOCK), "says BF16 and config.json says NVFP4 of"),
        (
            documents(PUBLISHED, {**BLOCK, "quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED}),
            "says NVFP4 and config.json says FP8 of",
        ),
    ],
    ids=["cache", "layers", "formats"],
)
def test_files_that_disagree_are_named(files: dict[str, Any], said: str) -> None:
    assert any(said in sentence for sentence in describe(files, headers()).contradictions)


def test_tensors_that_contradict_the_configuration_are_named() -> None:
    everything = dict.fromkeys(MODULES, "BF16")
    assert "no tensor of a linear layer is quantized" in describe(documents(), headers(everything)).contradictions[0]
    excluded = documents(quantization(exclude_modules=["lm_head", MODULES[0]]))
    assert f"BF16 of {MODULES[0]}; stored is U8" in describe(excluded, headers()).contradictions[0]
    half = {module: "F8_E5M2" for module in MODULES[:4]}
    assert "NVFP4 of" in describe(documents(), headers(half)).contradictions[0]


def test_a_layer_that_was_left_as_it_was_and_not_excluded_is_no_contradiction() -> None:
    found = describe(documents(), headers({MODULES[0]: "BF16"}))
    assert found.contradictions == ()
    assert found.layers[MODULES[0]] is BF16


def test_a_cache_without_scales_is_served_in_the_models_type() -> None:
    without = {name: one for name, one in headers().items() if not name.endswith("_scale")}
    found = describe(documents(), without)
    assert (found.cache, found.served_cache) == (kv_cache.FP8, kv_cache.AUTO)


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        (quantization(quant_algo="FP8_PB_WO"), "a scale for each block of 128x128"),
        (quantization(quant_algo="W4A8_MXFP4_FP8"), "MXFP4 weights with FP8 activations"),
        (quantization(group_size=32), "NVFP4 has groups of 16; this checkpoint says 32"),
        (quantization(quant_algo="FP8", group_size=128), "FP8 has no groups; this checkpoint says 128"),
        (quantization(quant_algo="NVFP4_SVD"), "SVDQuant"),
        (quantization(quant_algo="FP5"), "Supported: NVFP4"),
        (quantization(kv_cache_quant_algo="NVFP4_AFFINE"), "KV cache in NVFP4_AFFINE"),
        ({**PUBLISHED, "producer": {"name": "quantomatic", "version": "3"}}, "quantomatic 3, a tool that is not known"),
        (
            {**PUBLISHED, "producer": {"name": "modelopt", "version": "2.0"}},
            "modelopt 2.0, a version that is not known",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_what_is(hf: Any, said: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        describe(documents(hf), headers())
    assert said in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize(
    "hf",
    [
        [],
        {"quantization": "NVFP4"},
        quantization(exclude_modules="lm_head"),
        quantization(quant_algo=4),
        quantization(quant_algo="MIXED_PRECISION", quantized_layers=["model.layers.0"]),
        quantization(quant_algo="MIXED_PRECISION", quantized_layers={"model.layers.0": "NVFP4"}),
    ],
)
def test_a_configuration_of_another_form_is_damaged(hf: Any) -> None:
    with pytest.raises(IntegrityError, match="does not describe a quantization"):
        describe({"config.json": CONFIG, "hf_quant_config.json": hf}, headers())


def test_a_regular_expression_that_is_not_valid_is_named() -> None:
    with pytest.raises(UnsupportedError, match="regular expression that is not valid"):
        _ = describe(documents(quantization(exclude_modules=["re:("])), headers()).layers


def test_real_exports_are_described_in_both_layouts(checkpoints: dict[str, Path]) -> None:
    for path in checkpoints.values():
        unified, tensorrt_llm = (describe_directory(path / name) for name in ("unified", "tensorrt_llm"))
        assert (unified.layout, tensorrt_llm.layout) == ("unified", "tensorrt_llm")
        assert unified.contradictions == tensorrt_llm.contradictions == ()
        assert unified.producer == tensorrt_llm.producer
        assert unified.producer.name == "modelopt"
        for found in (unified, tensorrt_llm):
            assert set(found.layers.values()) == {NVFP4}
            assert found.served_cache is kv_cache.FP8
        assert len(unified.layers) == 7 / 5 * len(tensorrt_llm.layers)


def test_a_directory_without_a_known_quantization_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no quantization that is known"):
        describe_directory(Path(__file__).parents[1] / "data/tiny-qwen3")
    assert description.layout_of({"config.json": {"quantization_config": {"quant_method": "gptq"}}}) is None
