"""The two layouts of a quantized checkpoint, and the way from one to the other.

`unified/`       what ModelOpt exports: Hugging Face names, `hf_quant_config.json`, one or more shards.
`tensorrt_llm/`  what trtllm-build reads: `config.json`, `rank0.safetensors`; the same bytes under other names.
What each linear layer stores is its number format's (builder/formats). Where layers are in several formats both
layouts say MIXED_PRECISION, and name each layer's format in `quant_cfg.json`.
Standard library only: tensors are streamed, never loaded. Files named in comments are those under `tensorrt_llm/` of
NVIDIA/TensorRT-LLM 1.x, or under `modelopt/torch/` of ModelOpt, which was measured as 0.37 and 0.47.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.core.untrusted_text import parse_json, read_regular
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED, DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat
from builder.llmapi import versions as llmapi_versions

RANK_FILE = "rank0.safetensors"
QUANT_CFG = "quant_cfg.json"  # beside config.json where quant_algo is MIXED_PRECISION

# TensorRT-LLM's linear layers and the projections they are made of, concatenated in dim 0. GatedMLP computes
# proj(act(fc(x)) * gate(x)) (layers/mlp.py), so `fc` is the gate_proj (models/model_weights_loader.py says the same).
LINEARS: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
# The projections that are one matrix when served, and the name that servers have for it.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
NORMS: Mapping[str, str] = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
}

_QWEN = {
    # QWenDecoderLayer reads qwen_type and seq_length as attributes without default; 8192 is what
    # QWenConfig.from_hugging_face writes where the model does not say (it serves only logn attention).
    "seq_length": 8192,
    "use_logn_attn": False,
    "num_labels": 1,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
}
_LLAMA = {"residual_mlp": False, "remove_duplicated_kv_heads": False, "has_partial_lora_mask": False}
# The architectures whose names above are right, with what only their configuration class has.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": {"qwen_type": "qwen2", "qk_layernorm": False, **_QWEN},
    "Qwen3ForCausalLM": {"qwen_type": "qwen3", "qk_layernorm": True, **_QWEN},
}
# RotaryScalingType.from_string (functional.py) knows them; "default" it refuses, longrope has no place in these models.
ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model in both layouts. `digest` is of its files' contents, `facts` what quantizing it told."""

    path: Path
    digest: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unified(self) -> Path:
        return self.path / "unified"

    @property
    def tensorrt_llm(self) -> Path:
        return self.path / "tensorrt_llm"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; IntegrityError where the file is absent or something else."""
    try:
        content = parse_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read as JSON.", why=str(error)) from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} is no JSON object.")
    return content


def architecture(config: Mapping[str, Any]) -> str:
    """The model's class name; UnsupportedError if the TensorRT-LLM layout of it is not known here."""
    name = (config.get("architectures") or [config.get("architecture", "unknown")])[0]
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{name} has no TensorRT-LLM layout here.",
            why=f"The known ones: {', '.join(ARCHITECTURES)}.",
            hint=_without_engine(name),
        )
    if name == "Qwen3ForCausalLM" and config.get("attention_bias"):
        raise UnsupportedError(
            f"{name} with attention_bias has no TensorRT-LLM layout.",
            why="With it every attention projection has a bias, and TensorRT-LLM's Qwen has none in the output "
            "projection (tensorrt_llm/models/qwen/model.py, dense_bias=False).",
            hint=_without_engine(name),
        )
    return str(name)


def _without_engine(name: str) -> str:
    """The hint for a model that has no engine: the LLM API where it serves the architecture."""
    if name in llmapi_versions.read()["architectures"]:
        return "Serve the Hugging Face layout, on a GPU and without an engine: --target llmapi. Or take another model."
    return "Take one of these models, or stop at the checkpoint in the Hugging Face layout: `builder quantize`."


def head_size(config: Mapping[str, Any]) -> int:
    """Width of an attention head in either layout's config. Mistral's and Llama's may leave `head_dim` out or null."""
    given = config.get("head_dim") or config.get("head_size")
    return int(given or config["hidden_size"] // config["num_attention_heads"])


def write_tensorrt_llm(unified: Path, source_config: Mapping[str, Any], destination: Path) -> None:
    """Writes `destination` (config.json, rank0.safetensors) from ModelOpt's export and the source model's config.json.

    UnsupportedError for another architecture or number format, IntegrityError where tensors are missing or disagree.
    """
    architecture(source_config)
    quant_config = read_json(unified / "hf_quant_config.json")
    quantization = quant_config.get("quantization") or {}
    formats, cache = declared(quantization), kv_cache.of_checkpoint(quantization.get("kv_cache_quant_algo"))
    layout = _Layout(Tensors(unified), formats)
    for layer in range(source_config["num_hidden_layers"]):
        _layer(layout, layer, cache)
    layout.join("transformer.vocab_embedding.weight", "model.embed_tokens.weight")
    layout.join("transformer.ln_f.weight", "model.norm.weight")
    _head(layout, tied=bool(source_config.get("tie_word_embeddings")))
    layout.check_nothing_left()
    config = _config(source_config, layout, quantization, quant_config.get("producer"))
    destination.mkdir(parents=True, exist_ok=True)
    write(destination / RANK_FILE, layout.made)
    if layout.whole_format is None:
        entries = {name: one.layer_entry for name, one in layout.formats.items()}
        write_quant_cfg(destination, {**config["quantization"], "quantized_layers": entries})
    write_json(destination / "config.json", config)


def write_quant_cfg(directory: Path, quantization: Mapping[str, Any]) -> None:
    """What TensorRT-LLM reads beside config.json where quant_algo is MIXED_PRECISION: for engines models/
    modeling_utils.py, PretrainedConfig.from_json_file, and for the Hugging Face layout, whose own list of the layers
    1.2 does not look at, _torch/model_config.py, load_modelopt_quant_config."""
    keys = ("quant_algo", "kv_cache_quant_algo", "quantized_layers")
    write_json(directory / QUANT_CFG, {key: quantization.get(key) for key in keys})


class _Layout:
    """The TensorRT-LLM tensors made so far, and which unified ones went into them."""

    def __init__(self, source: Tensors, declared: DeclaredFormats) -> None:
        self.source, self.declared = source, declared
        self.made: list[NewTensor] = []
        self.unquantized: list[str] = []
        self.formats: dict[str, NumberFormat] = {}  # of the quantized layers, by their TensorRT-LLM names
        self._used: set[str] = set()

    def join(self, name: str, *sources: str) -> None:
        """Makes a tensor of one or several, concatenated in dim 0."""
        infos = [self.source[s] for s in self._take(sources)]
        if len({(info.dtype, info.shape[1:]) for info in infos}) > 1:
            raise IntegrityError(f"{', '.join(sources)} differ in dtype or width, so {name} cannot be made of them.")
        shape = infos[0].shape
        if len(infos) > 1:
            shape = (sum(info.shape[0] for info in infos), *shape[1:])
        self.made.append(NewTensor(name, infos[0].dtype, shape, self.source.chunks(*sources)))

    @property
    def whole_format(self) -> NumberFormat | None:
        """The one format of all quantized layers; None where each layer's must be named."""
        used = set(self.formats.values())
        one = next(iter(used), self.declared.default)
        return one if one and one.whole_model and len(used) < 2 else None

    def agree(self, name: str, *sources: str, shape: tuple[int, ...] | None = None) -> None:
        """Makes a scalar of several that must be the same: one GEMM has one global scale."""
        if len({bytes(self.source.data(s)) for s in self._take(sources)}) > 1:
            raise IntegrityError(
                f"{', '.join(sources)} differ.",
                why=f"TensorRT-LLM multiplies them as one layer, which has one {name.rsplit('.', 1)[-1]}.",
                hint="Quantize again with a quantizer that shares the scales of q, k and v, as ModelOpt does.",
            )
        info = self.source[sources[0]]
        shape = info.shape if shape is None else shape
        self.made.append(NewTensor(name, info.dtype, shape, self.source.chunks(sources[0])))

    def scalar(self, source: str) -> float:
        """A positive F32 scale as a number."""
        self._take([source])
        data = bytes(self.source.data(source))
        value = float(struct.unpack("<f", data)[0]) if len(data) == 4 else math.nan
        if not (math.isfinite(value) and value > 0):
            raise IntegrityError(f"{source} is {value}, where a scale must be finite and positive.")
        return value

    def _take(self, names: Iterable[str]) -> Iterable[str]:
        missing = [name for name in names if name not in self.source]
        if missing:
            raise IntegrityError(f"The quantized checkpoint lacks {', '.join(missing)}.", hint="Quantize again.")
        self._used.update(names)
        return names

    def check_nothing_left(self) -> None:
        """A tensor without a place in TensorRT-LLM's model must not vanish silently."""
        ignored = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")
        left = sorted(n for n in self.source if n not in self._used and not n.endswith(ignored))
        if left:
            raise UnsupportedError(
                f"{len(left)} tensors have no place in the TensorRT-LLM layout: {', '.join(left[:10])}.",
                why="The model has parts that this architecture usually has not.",
            )


def _layer(layout: _Layout, layer: int, cache: KvCacheFormat) -> None:
    theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{layer}."
    for name, norm in NORMS.items():
        if not norm.endswith(("q_norm", "k_norm")) or f"{theirs}{norm}.weight" in layout.source:
            layout.join(f"{ours}{name}.weight", f"{theirs}{norm}.weight")
    for name, projections in LINEARS.items():
        _linear(layout, ours + name, [theirs + projection for projection in projections])
    if cache.quantized:
        # "Recommend default kv cache scaling factor to be 1": clamped as ModelOpt's TensorRT-LLM export does
        # (export/quant_utils.py, get_kv_cache_scaling_factor). TensorRT-LLM takes max(k, v) for both.
        k, v = (max(layout.scalar(f"{theirs}self_attn.{name}"), 1.0) for name in cache.unified)
        for name, value in zip(cache.tensorrt_llm, (k, v, max(k, v)), strict=True):
            data = struct.pack("<f", value)
            layout.made.append(NewTensor(f"{ours}attention.{name}", "F32", (1,), [data]))


def _linear(layout: _Layout, name: str, projections: list[str]) -> None:
    def named(suffix: str) -> list[str]:
        return [f"{projection}.{suffix}" for projection in projections]

    layout.join(f"{name}.weight", *named("weight"))
    if any(bias in layout.source for bias in named("bias")):
        layout.join(f"{name}.bias", *named("bias"))
    number_format = layout.declared.stored(projections[0], layout.source[f"{projections[0]}.weight"].dtype)
    if number_format.quant_algo is None:
        layout.unquantized.append(name)
        return
    layout.formats[name] = number_format
    for tensor in number_format.tensors[1:]:
        if tensor.per_output:
            layout.join(f"{name}.{tensor.tensorrt_llm}", *named(tensor.unified))
        else:
            layout.agree(f"{name}.{tensor.tensorrt_llm}", *named(tensor.unified), shape=tensor.tensorrt_llm_shape)


def _head(layout: _Layout, *, tied: bool) -> None:
    """PretrainedModel.load takes a checkpoint without lm_head.weight, but leaves the weights as they were: so it is
    always written, from the embedding where the two are tied (as ModelOpt's TensorRT-LLM export does)."""
    source = "lm_head.weight"
    if source not in layout.source and tied:
        source = "model.embed_tokens.weight"
    layout.join("lm_head.weight", source)
    if layout.made[-1].dtype not in DTYPES:
        raise IntegrityError(f"{source} is quantized ({layout.made[-1].dtype}), and the output layer must not be.")
    layout.unquantized.append("lm_head")


def rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """The base and, where there is any, the scaling, from the spelling of transformers 4 or of 5."""
    parameters = config.get("rope_parameters") or {}
    bases = {float(b) for b in (config.get("rope_theta"), parameters.get("rope_theta")) if b is not None}
    if len(bases) > 1:
        raise IntegrityError(f"config.json names two bases of the rotary embedding: {sorted(bases)}.")
    scaling = {**parameters, **(config.get("rope_scaling") or {})}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    rotated = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if kind not in ("default", *ROPE_TYPES) or rotated != 1.0 or any(isinstance(v, dict) for v in parameters.values()):
        raise UnsupportedError(
            f"The rotary embedding {dict(scaling)} has no TensorRT-LLM layout here.",
            why=f"The whole head rotated, with one of these scalings or none, has: {', '.join(ROPE_TYPES)}.",
        )
    scaling.pop("rope_theta", None)
    if kind in ("llama3", "yarn"):
        # transformers takes max_position_embeddings where it is not said, TensorRT-LLM 8192 or 4096.
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    base = bases.pop() if bases else 10000.0  # transformers' default for all these models
    return base, None if kind == "default" else {**scaling, "type": kind, "rope_type": kind}


def _config(
    source: Mapping[str, Any], layout: _Layout, quantization: Mapping[str, Any], producer: Any
) -> dict[str, Any]:
    """Every field that PretrainedConfig and the model's own configuration class read, none left to a default.

    hidden_act and rms_norm_eps have the same defaults in transformers' four configuration classes.
    logits_dtype is PretrainedConfig's default, which Triton's templates expect (TYPE_FP32); ModelOpt writes float16.
    """
    made = {tensor.name: tensor for tensor in layout.made}
    rotary_base, rotary_scaling = rope(source)
    name = architecture(source)
    return {
        "producer": producer or {"name": "unknown"},
        "architecture": name,
        "dtype": DTYPES[made["transformer.vocab_embedding.weight"].dtype],
        "logits_dtype": "float32",
        **{key: source[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
        "num_key_value_heads": source.get("num_key_value_heads") or source["num_attention_heads"],
        "head_size": head_size(source),
        "qk_layernorm": False,
        "intermediate_size": source["intermediate_size"],
        "hidden_act": source.get("hidden_act") or "silu",
        "norm_epsilon": source.get("rms_norm_eps") or 1e-6,
        **_biases(made, name),
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": source["max_position_embeddings"],
        "rotary_base": rotary_base,
        "rotary_scaling": rotary_scaling,
        "rotary_pct": 1.0,
        "rotary_embedding_dim": head_size(source),
        "tie_word_embeddings": bool(source.get("tie_word_embeddings")),
        "share_embedding_table": False,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "disable_weight_only_quant_plugin": False,
        # The long form of `moe` changes with the version; both configuration classes take these two instead.
        "moe_num_experts": 0,
        "moe_top_k": 0,
        **{key: source.get(key, value) for key, value in ARCHITECTURES[name].items()},
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": _quantization(layout, quantization.get("kv_cache_quant_algo")),
    }


def _quantization(layout: _Layout, kv_algo: str | None) -> dict[str, Any]:
    """As ModelOpt writes it (export/model_config_export.py). Where layers differ quant_cfg.json holds their formats."""
    one = layout.whole_format
    if one is None:
        return {"quant_algo": MIXED, "kv_cache_quant_algo": kv_algo}
    entry = {"quant_algo": one.quant_algo, "kv_cache_quant_algo": kv_algo, **one.layer_entry}
    return {**entry, "exclude_modules": sorted(layout.unquantized)}


def _biases(made: Mapping[str, NewTensor], name: str) -> dict[str, bool]:
    """attn_bias and mlp_bias. Each is one word for several linear layers of all decoder layers, which must agree;
    Qwen's output projection never has a bias (models/qwen/model.py, dense_bias=False)."""
    has = {linear: _bias(made, linear) for linear in LINEARS}
    dense = has["attention.qkv"] and "qwen_type" not in ARCHITECTURES[name]
    wanted = {**has, "attention.dense": dense, "mlp.gate": has["mlp.fc"], "mlp.proj": has["mlp.fc"]}
    if has != wanted:
        raise UnsupportedError(f"TensorRT-LLM's {name} has no place for these biases: {has}.")
    return {"attn_bias": has["attention.qkv"], "mlp_bias": has["mlp.fc"]}


def _bias(made: Mapping[str, NewTensor], linear: str) -> bool:
    weights = [name for name in made if name.endswith(f"{linear}.weight")]
    with_bias = [name for name in weights if name.removesuffix("weight") + "bias" in made]
    if with_bias and with_bias != weights:
        raise UnsupportedError(f"Only some layers have a bias in {linear}.", why=", ".join(with_bias[:10]))
    return bool(with_bias)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step; its mode honours the umask."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)
