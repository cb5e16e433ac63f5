"""TensorRT-LLM's layout back to the Hugging Face one: bit for bit, for every format, whole and split over ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import exports
import fabricated
import pytest

from builder.checkpoint import layouts, sharding, validate
from builder.checkpoint.from_tensorrt_llm import unified_parts
from builder.checkpoint.sharding import Parallel
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats import registry
from builder.formats.base import NumberFormat

FORMATS = [one for one in registry.for_tensorrt_llm() if one.quant_algo is not None]
# Blocks of 128 fit the widths of one model.
CASES = [(one.name, model) for one in FORMATS for model in exports.MODELS if one.group_size != 128 or model == "qwen3"]
EXCLUDED = {"qwen3": ["model.layers.1.mlp.down_proj", "model.layers.4.mlp.down_proj"]}


def both(tmp_path: Path, one: NumberFormat, model: str, excluded: Sequence[str] = ()) -> tuple[Path, Path]:
    unified = fabricated.unified(exports.MODELS[model], one, tmp_path / "unified", excluded=excluded)
    config = layouts.read_json(unified / "config.json")
    layouts.write_tensorrt_llm(unified, config, tmp_path / "tensorrt_llm")
    return unified, tmp_path / "tensorrt_llm"


def again(tensorrt_llm: Path, model: str, destination: Path) -> tuple[Tensors, dict[str, object]]:
    made, said = unified_parts(tensorrt_llm, layouts.read_json(exports.MODELS[model] / "config.json"))
    destination.mkdir()
    write(destination / "model.safetensors", made, {"format": "pt"})
    return Tensors(destination), said


def assert_same(made: Tensors, expected: Tensors) -> None:
    assert set(made) == set(expected)
    assert not [n for n in made if (made[n].dtype, made[n].shape) != (expected[n].dtype, expected[n].shape)]
    assert not [n for n in made if made.read(n) != expected.read(n)]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_every_format_comes_back_bit_for_bit(tmp_path: Path, name: str, model: str) -> None:
    one, excluded = registry.get(name), EXCLUDED.get(model, ())
    unified, tensorrt_llm = both(tmp_path, one, model, excluded)
    made, said = again(tensorrt_llm, model, tmp_path / "again")
    assert_same(made, Tensors(unified))
    assert said == layouts.read_json(unified / "hf_quant_config.json")
    for tp, pp in ((2, 1), (1, 2)) if model == "qwen3" else ((2, 1),):
        if one.group_size == 64 and model != "qwen3":  # half of their 64 inputs is less than a block
            with pytest.raises(UnsupportedError, match="has one scale for 64 inputs"):
                sharding.split(tensorrt_llm, tmp_path / f"tp{tp}pp{pp}", Parallel(tp, pp))
            return
        sharding.split(tensorrt_llm, tmp_path / f"tp{tp}pp{pp}", Parallel(tp, pp))
        joined, _ = again(tmp_path / f"tp{tp}pp{pp}", model, tmp_path / f"again{tp}{pp}")
        assert_same(joined, Tensors(unified))


def test_layers_in_different_formats_come_back(tmp_path: Path) -> None:
    unified, _ = both(tmp_path, registry.NVFP4, "llama")
    mixed = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}
    layers = sorted({name.removesuffix(".weight") for name in Tensors(unified) if "_proj.weight" in name[-14:]})
    listed = {layer: registry.NVFP4.layer_entry for layer in layers if "layers.1.mlp.down_proj" not in layer}
    said = {"producer": {"name": "modelopt"}, "quantization": {**mixed, "quantized_layers": listed}}
    (unified / "hf_quant_config.json").write_text(json.dumps(said))
    source, module = Tensors(exports.MODELS["llama"]), "model.layers.1.mlp.down_proj"
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    plain = NewTensor(f"{module}.weight", "BF16", source[f"{module}.weight"].shape, [source.read(f"{module}.weight")])
    changed = exports.rewrite(
        unified, tmp_path / "u", {plain.name: plain, **{f"{module}.{one}": None for one in scales}}
    )
    layouts.write_tensorrt_llm(changed, layouts.read_json(unified / "config.json"), tmp_path / "t")
    made, what = again(tmp_path / "t", "llama", tmp_path / "again")
    assert_same(made, Tensors(changed))
    quantization = what["quantization"]
    assert isinstance(quantization, dict)
    assert quantization["exclude_modules"] == ["lm_head", module]


def test_int4_has_another_type_and_ones_in_tensorrt_llms_layout(tmp_path: Path) -> None:
    unified, tensorrt_llm = (Tensors(at) for at in both(tmp_path, registry.get("int4_awq_64"), "llama"))
    attention, layer = "model.layers.0.self_attn", "transformer.layers.0"
    qkv = tensorrt_llm[f"{layer}.attention.qkv.weight"]
    assert (qkv.dtype, qkv.shape) == ("I8", ((128 + 64 + 64) // 2, 64))
    parts = b"".join(unified.read(f"{attention}.{x}_proj.weight") for x in "qkv")
    assert tensorrt_llm.read(f"{layer}.attention.qkv.weight") == parts
    assert f"{attention}.q_proj.pre_quant_scale" not in unified
    for name in ("attention.qkv", "mlp.fc", "mlp.gate"):
        assert tensorrt_llm.read(f"{layer}.{name}.prequant_scaling_factor") == b"\x80\x3f" * 64
    assert tensorrt_llm.read(f"{layer}.attention.dense.prequant_scaling_factor") == unified.read(
        f"{attention}.o_proj.pre_quant_scale"
    )
    said = layouts.read_json(tmp_path / "tensorrt_llm" / "config.json")["quantization"]
    assert said == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": "FP8",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    }


def test_nvfp4_awq_lacks_what_is_folded_in_both(tmp_path: Path) -> None:
    """No engine reads it, so its layout need not hold ones."""
    unified, tensorrt_llm = (Tensors(at) for at in both(tmp_path, registry.get("nvfp4_awq"), "llama"))
    held = {name.split(".", 3)[3] for name in tensorrt_llm if name.endswith("prequant_scaling_factor")}
    assert held == {"attention.dense.prequant_scaling_factor", "mlp.proj.prequant_scaling_factor"}
    assert sum(name.endswith("pre_quant_scale") for name in unified) == 4


@pytest.mark.parametrize("name", ["int8_sq", "int4_awq_64", "nvfp4_awq"])
def test_ranks_hold_their_share_of_the_scales(tmp_path: Path, name: str) -> None:
    """Scales of inputs are split where the inputs are, scales of outputs where the outputs are (ModelOpt's
    export/postprocess.py, "Split Rules")."""
    _, whole = both(tmp_path, registry.get(name), "qwen3")
    sharding.split(whole, tmp_path / "tp2", Parallel(2))
    everything, ranks = Tensors(whole), [Tensors(tmp_path, [tmp_path / "tp2" / f"rank{n}.safetensors"]) for n in (0, 1)]
    for row in ("attention.dense", "mlp.proj"):
        scale = f"transformer.layers.0.{row}.prequant_scaling_factor"
        assert b"".join(rank.read(scale) for rank in ranks) == everything.read(scale)
    assert not validate.inspect(tmp_path / "tp2").errors
    if name == "int8_sq":
        outputs = "transformer.layers.0.mlp.proj.weights_scaling_factor"
        assert all(rank.read(outputs) == everything.read(outputs) for rank in ranks)
        outputs = "transformer.layers.0.mlp.fc.weights_scaling_factor"
        assert b"".join(rank.read(outputs) for rank in ranks) == everything.read(outputs)


def test_scales_that_are_not_folded_are_rejected(tmp_path: Path) -> None:
    """ModelOpt's own TensorRT-LLM export of AWQ keeps those of q, k and v."""
    _, whole = both(tmp_path, registry.get("int4_awq_64"), "llama")
    name = "transformer.layers.1.attention.qkv.prequant_scaling_factor"
    scales = NewTensor(name, "BF16", (64,), [b"\x00\x3f" * 64])
    changed = exports.rewrite(whole, tmp_path / "changed", {name: scales})
    with pytest.raises(UnsupportedError, match=f"{name} has scales of AWQ") as caught:
        again(changed, "llama", tmp_path / "again")
    assert "Serve it as it is" in caught.value.hint


def test_another_models_configuration_and_missing_tensors_are_named(tmp_path: Path) -> None:
    _, whole = both(tmp_path, registry.NVFP4, "llama")
    with pytest.raises(IntegrityError, match="not of this model: hidden_size 64 and 256"):
        again(whole, "qwen3", tmp_path / "again")
    name = "transformer.layers.1.mlp.fc.weights_scaling_factor"
    lacking = exports.rewrite(whole, tmp_path / "lacking", {name: None})
    with pytest.raises(IntegrityError, match=f"lacks {name}"):
        again(lacking, "llama", tmp_path / "again")
    extra = NewTensor("transformer.layers.1.mlp.router.weight", "F32", (1,), [b"\0\0\x80\x3f"])
    more = exports.rewrite(whole, tmp_path / "more", {extra.name: extra})
    with pytest.raises(UnsupportedError, match=r"1 tensors have no place .*: transformer.layers.1.mlp.router.weight"):
        again(more, "llama", tmp_path / "again")


def test_inspection_requires_the_scales_that_servers_always_read(tmp_path: Path) -> None:
    """INT4: the LLM class reads those of o_proj and down_proj, an engine those of every layer; NVFP4: none."""
    name, engine = (
        "model.layers.0.self_attn.o_proj.pre_quant_scale",
        "transformer.layers.1.mlp.fc.prequant_scaling_factor",
    )
    for one in ("int4_awq_64", "nvfp4_awq"):
        unified, whole = both(tmp_path / one, registry.get(one), "llama")
        assert not validate.inspect(unified.parent).findings
        lacking = exports.rewrite(unified, tmp_path / one / "lacking", {name: None})
        found = [(finding.tensor, finding.kind) for finding in validate.inspect(lacking).findings]
        assert found == ([(name, "missing")] if one == "int4_awq_64" else [])
    whole = tmp_path / "int4_awq_64" / "tensorrt_llm"
    found = validate.inspect(exports.rewrite(whole, tmp_path / "engine", {engine: None})).findings
    assert [(finding.tensor, finding.kind) for finding in found] == [(engine, "missing")]
