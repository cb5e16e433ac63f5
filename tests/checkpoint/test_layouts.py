"""The TensorRT-LLM layout against ModelOpt's export of the same calibration; completing a unified layout."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import exports
import pytest

from builder.architectures.attention import rope
from builder.checkpoint import huggingface, layouts
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write

Exports = dict[str, Path]

# Fields of ModelOpt's config.json that ours leaves out: no TensorRT-LLM class of these models reads them.
# `bias`, `lm_head_bias`, `rmsnorm` and `decoder` are fields of ModelOpt only; `rank` is 0 in every file.
DROPPED = {"rank", "decoder", "rmsnorm", "lm_head_bias", "bias"}
# Fields whose value differs from ModelOpt's. PretrainedConfig's default and Triton's `logits_datatype` are 32 bit.
WRONG = {"logits_dtype": "float32"}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """For each model a directory with ModelOpt's `unified` and `modelopt` layouts, and `ours`, made from the first."""
    made = {}
    for name, source in exports.MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        exports.export(exports.quantized(source), made[name] / "unified", made[name] / "modelopt")
        layouts.write_tensorrt_llm(made[name] / "unified", source_config(name), made[name] / "ours")
    return made


def source_config(name: str) -> dict[str, Any]:
    return layouts.read_json(exports.MODELS[name] / "config.json")


def f32(name: str, value: float) -> NewTensor:
    return NewTensor(name, "F32", (), [struct.pack("<f", value)])


@pytest.mark.parametrize("name", exports.MODELS)
def test_all_tensors_equal_modelopts(exported: Exports, name: str) -> None:
    ours, theirs = Tensors(exported[name] / "ours"), Tensors(exported[name] / "modelopt")
    assert set(ours) == set(theirs)
    different = [n for n in ours if (ours[n].dtype, ours[n].shape) != (theirs[n].dtype, theirs[n].shape)]
    assert not different
    assert not [n for n in ours if ours.read(n) != theirs.read(n)]


@pytest.mark.parametrize("name", exports.MODELS)
def test_the_config_agrees_with_modelopts_where_it_is_right(exported: Exports, name: str) -> None:
    ours = layouts.read_json(exported[name] / "ours" / "config.json")
    theirs = layouts.read_json(exported[name] / "modelopt" / "config.json")
    if "Qwen" in theirs["architecture"]:
        theirs.pop("residual_mlp")  # LLaMAConfig has it, QWenConfig has not
    expected = {key: value for key, value in theirs.items() if key not in DROPPED} | WRONG
    assert {key: ours[key] for key in expected} == expected


def test_the_config_has_the_fields_that_modelopt_omits(exported: Exports) -> None:
    qwen3 = layouts.read_json(exported["qwen3"] / "ours" / "config.json")
    assert qwen3["qwen_type"] == "qwen3"
    assert qwen3["attn_bias"] is False
    assert qwen3["qk_layernorm"] is True
    assert qwen3["rotary_base"] == 10000.0
    assert qwen3["rotary_scaling"] is None
    assert qwen3["seq_length"] == 8192
    assert (qwen3["moe_num_experts"], qwen3["moe_top_k"]) == (0, 0)
    assert qwen3["tie_word_embeddings"] is False
    qwen2 = layouts.read_json(exported["qwen2"] / "ours" / "config.json")
    assert qwen2["qwen_type"] == "qwen2"
    assert qwen2["attn_bias"] is True
    assert qwen2["tie_word_embeddings"] is True
    llama = layouts.read_json(exported["llama"] / "ours" / "config.json")
    assert llama["attn_bias"] is llama["mlp_bias"] is llama["residual_mlp"] is False
    assert "qwen_type" not in llama


def test_a_tied_head_is_written_twice(exported: Exports) -> None:
    ours = Tensors(exported["qwen2"] / "ours")
    assert "lm_head.weight" not in Tensors(exported["qwen2"] / "unified")
    assert ours.read("lm_head.weight") == ours.read("transformer.vocab_embedding.weight")


def test_shards_give_the_same_file(exported: Exports, tmp_path: Path) -> None:
    unified, tensors = exported["llama"] / "unified", Tensors(exported["llama"] / "unified")
    shutil.copytree(unified, tmp_path / "unified", ignore=shutil.ignore_patterns("*.safetensors"))
    shards: dict[str, list[str]] = {"a": [], "b": []}
    for n, name in enumerate(sorted(tensors)):
        shards["ab"[n % 2]].append(name)
    for shard, names in shards.items():
        new = [NewTensor(n, tensors[n].dtype, tensors[n].shape, tensors.chunks(n)) for n in names]
        write(tmp_path / "unified" / f"{shard}.safetensors", new)
    index = {"weight_map": {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}}
    (tmp_path / "unified" / "model.safetensors.index.json").write_text(json.dumps(index))
    layouts.write_tensorrt_llm(tmp_path / "unified", source_config("llama"), tmp_path / "ours")
    for file in ("config.json", layouts.RANK_FILE):
        assert (tmp_path / "ours" / file).read_bytes() == (exported["llama"] / "ours" / file).read_bytes()


def test_kv_scales_are_at_least_one_and_tensorrt_llm_uses_the_larger(exported: Exports, tmp_path: Path) -> None:
    scales = {"model.layers.0.self_attn.k_proj.k_scale": 2.5, "model.layers.0.self_attn.v_proj.v_scale": 0.25}
    unified = exports.rewrite(exported["llama"] / "unified", tmp_path / "u", {n: f32(n, v) for n, v in scales.items()})
    layouts.write_tensorrt_llm(unified, source_config("llama"), tmp_path / "ours")
    ours, prefix = Tensors(tmp_path / "ours"), "transformer.layers.0.attention."
    read = {w: struct.unpack("<f", ours.read(f"{prefix}{w}_cache_scaling_factor"))[0] for w in ("k", "v", "kv")}
    assert read == {"k": 2.5, "v": 1.0, "kv": 2.5}


def test_an_unquantized_kv_cache_has_no_scales(tmp_path: Path) -> None:
    exports.export(exports.quantized(exports.MODELS["llama"], kv_cache=False), tmp_path / "u", tmp_path / "modelopt")
    layouts.write_tensorrt_llm(tmp_path / "u", source_config("llama"), tmp_path / "ours")
    assert layouts.read_json(tmp_path / "ours" / "config.json")["quantization"]["kv_cache_quant_algo"] is None
    assert set(Tensors(tmp_path / "ours")) == set(Tensors(tmp_path / "modelopt"))
    assert not [name for name in Tensors(tmp_path / "ours") if "cache" in name]


def test_an_unquantized_layer_is_excluded_by_its_tensorrt_llm_name(exported: Exports, tmp_path: Path) -> None:
    module = "model.layers.1.mlp.down_proj"
    weight = NewTensor(f"{module}.weight", "BF16", (64, 128), [b"\x80\x3f" * (64 * 128)])
    changes = {
        weight.name: weight,
        **{f"{module}.{s}": None for s in ("weight_scale", "weight_scale_2", "input_scale")},
    }
    unified = exports.rewrite(exported["llama"] / "unified", tmp_path / "u", changes)
    layouts.write_tensorrt_llm(unified, source_config("llama"), tmp_path / "ours")
    config = layouts.read_json(tmp_path / "ours" / "config.json")
    assert config["quantization"]["exclude_modules"] == ["lm_head", "transformer.layers.1.mlp.proj"]
    assert Tensors(tmp_path / "ours")["transformer.layers.1.mlp.proj.weight"].dtype == "BF16"


LAYER = "model.layers.0.self_attn."
REJECTED: dict[str, tuple[dict[str, NewTensor | None], type[Exception], str]] = {
    "scales that differ": (
        {f"{LAYER}k_proj.input_scale": f32(f"{LAYER}k_proj.input_scale", 0.5)},
        IntegrityError,
        "k_proj.input_scale",
    ),
    "a missing tensor": (
        {f"{LAYER}v_proj.weight_scale": None},
        IntegrityError,
        "lacks model.layers.0.self_attn.v_proj.weight_scale",
    ),
    "a missing KV scale": (
        {f"{LAYER}v_proj.v_scale": None},
        IntegrityError,
        "lacks model.layers.0.self_attn.v_proj.v_scale",
    ),
    "a negative KV scale": (
        {f"{LAYER}k_proj.k_scale": f32(f"{LAYER}k_proj.k_scale", -1.0)},
        IntegrityError,
        "k_scale is -1.0",
    ),
    "a KV scale that is NaN": (
        {f"{LAYER}k_proj.k_scale": f32(f"{LAYER}k_proj.k_scale", float("nan"))},
        IntegrityError,
        "k_scale is nan",
    ),
    "a part without a place": (
        {"model.extra.weight": f32("model.extra.weight", 1.0)},
        UnsupportedError,
        r"model\.extra\.weight",
    ),
    "a quantized head": (
        {"lm_head.weight": NewTensor("lm_head.weight", "U8", (4096, 32), [bytes(4096 * 32)])},
        IntegrityError,
        "lm_head.weight is quantized",
    ),
    "half of qkv quantized": (
        {f"{LAYER}q_proj.weight": NewTensor(f"{LAYER}q_proj.weight", "BF16", (128, 64), [bytes(128 * 64 * 2)])},
        IntegrityError,
        "differ in dtype",
    ),
    "a bias of the output alone": (
        {f"{LAYER}o_proj.bias": NewTensor(f"{LAYER}o_proj.bias", "BF16", (64,), [bytes(128)])},
        UnsupportedError,
        "Only some layers have a bias in attention.dense",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_exports_without_a_tensorrt_llm_layout_are_rejected(exported: Exports, tmp_path: Path, case: str) -> None:
    changes, error, match = REJECTED[case]
    unified = exports.rewrite(exported["llama"] / "unified", tmp_path / "u", changes)
    with pytest.raises(error, match=match):
        layouts.write_tensorrt_llm(unified, source_config("llama"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_other_models_and_formats_are_rejected(exported: Exports, tmp_path: Path) -> None:
    gemma = layouts.read_json(exports.DATA / "arch-variants" / "gemma2" / "config.json")
    with pytest.raises(UnsupportedError, match=r"Gemma2ForCausalLM[\s\S]*LlamaForCausalLM.*Qwen3ForCausalLM"):
        layouts.write_tensorrt_llm(exported["llama"] / "unified", gemma, tmp_path / "ours")
    unified = exports.rewrite(exported["llama"] / "unified", tmp_path / "u", {})
    quantization = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (unified / "hf_quant_config.json").write_text(json.dumps(quantization))
    with pytest.raises(UnsupportedError, match=r"have no place.*weight_scale_2"):
        layouts.write_tensorrt_llm(unified, source_config("llama"), tmp_path / "ours")
    quantization = {"quantization": {"quant_algo": "W4A8_AWQ", "kv_cache_quant_algo": "FP8"}}
    (unified / "hf_quant_config.json").write_text(json.dumps(quantization))
    with pytest.raises(UnsupportedError, match="W4A8_AWQ"):
        layouts.write_tensorrt_llm(unified, source_config("llama"), tmp_path / "ours")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0}
SIZE = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
ROPES: dict[str, tuple[dict[str, Any], tuple[float, Any]]] = {
    "nothing said": ({}, (10000.0, None)),
    "transformers 4": ({"rope_theta": 1e6, "rope_scaling": None}, (1e6, None)),
    "transformers 5": ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, (1e6, None)),
    "both": ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, (1e6, None)),
    "llama3, 4": ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, (5e5, {**LLAMA3, "type": "llama3"})),
    "llama3, 5": ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, (5e5, {**LLAMA3, "type": "llama3"})),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        (10000.0, {"type": "linear", "rope_type": "linear", "factor": 2.0}),
    ),
    "yarn takes the model's length": (
        {"rope_scaling": YARN},
        (10000.0, {**YARN, "rope_type": "yarn", "original_max_position_embeddings": 512}),
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_in_both_spellings(case: str) -> None:
    config, expected = ROPES[case]
    assert rope({**SIZE, **config}) == expected


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, IntegrityError),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, UnsupportedError),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, UnsupportedError),
        ({"partial_rotary_factor": 0.5}, UnsupportedError),
    ],
)
def test_a_rope_that_tensorrt_llm_does_not_compute_is_rejected(config: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        rope({**SIZE, **config})


def loaded(directory: Path) -> tuple[float, str, Any]:
    """Rope base, rope type and dtype that the installed transformers, 4 or 5, reads from a config.json."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_theta") or config.rope_theta, rope.get("rope_type", "default"), config.dtype


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_a_completed_config_is_read_alike(tmp_path: Path, spelling: int, scaling: dict[str, Any] | None) -> None:
    import torch

    plain = {k: v for k, v in source_config("llama").items() if not k.startswith("rope") and "dtype" not in k}
    rope: dict[str, Any] = {"rope_theta": 5e5, "rope_scaling": scaling}
    if spelling == 5:
        rope = {"rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": 5e5}}
    for directory, config in (("source", plain | rope), ("unified", plain | {"dtype": "bfloat16"})):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "config.json").write_text(json.dumps(config))
    huggingface.complete(tmp_path / "unified", tmp_path / "source")
    assert loaded(tmp_path / "unified") == (5e5, "llama3" if scaling else "default", torch.bfloat16)
    written = layouts.read_json(tmp_path / "unified" / "config.json")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"] == scaling
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", exports.MODELS)
def test_an_export_is_completed(exported: Exports, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    unified, source = shutil.copytree(exported[name] / "unified", tmp_path / "u"), exports.MODELS[name]
    (unified / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    huggingface.complete(unified, source)
    for file in source.glob("tokenizer*"):
        assert (unified / file.name).read_bytes() == file.read_bytes()
    assert {path.stat().st_mode & 0o777 for path in unified.iterdir()} == {0o644}
    assert loaded(unified)[:2] == (10000.0, "default")
    assert AutoTokenizer.from_pretrained(unified).encode("a b") == AutoTokenizer.from_pretrained(source).encode("a b")


def test_both_rope_bases_of_gemma_3_are_kept(tmp_path: Path) -> None:
    source = exports.DATA / "arch-variants" / "gemma3_text"
    original = layouts.read_json(source / "config.json")
    del original["rope_theta"], original["rope_local_base_freq"]
    (tmp_path / "config.json").write_text(json.dumps(original))
    huggingface.complete(tmp_path, source)
    written = layouts.read_json(tmp_path / "config.json")
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert written["rope_parameters"] == original["rope_parameters"]


def test_a_file_that_is_not_json_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(IntegrityError, match="not a JSON object"):
        layouts.read_json(tmp_path / "config.json")
    with pytest.raises(IntegrityError, match="can't be read"):
        layouts.read_json(tmp_path / "absent.json")
