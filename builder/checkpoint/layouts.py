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

from builder.architectures import names, served
from builder.architectures.attention import head_size, kv_heads, rope
from builder.architectures.facts import Architecture, Engine, TensorNames
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.core.untrusted_text import parse_json, read_regular
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED, DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat

RANK_FILE = "rank0.safetensors"
QUANT_CFG = "quant_cfg.json"  # beside config.json where quant_algo is MIXED_PRECISION


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


def write_tensorrt_llm(unified: Path, source_config: Mapping[str, Any], destination: Path) -> None:
    """Writes `destination` (config.json, rank0.safetensors) from ModelOpt's export and the source model's config.json.

    UnsupportedError for another architecture or number format, IntegrityError where tensors are missing or disagree.
    """
    architecture, engine = served.check_engine(source_config)
    assert architecture.tensors is not None
    table = architecture.tensors
    quant_config = read_json(unified / "hf_quant_config.json")
    quantization = quant_config.get("quantization") or {}
    formats, cache = declared(quantization), kv_cache.of_checkpoint(quantization.get("kv_cache_quant_algo"))
    layout = _Layout(Tensors(unified), formats)
    for layer in range(source_config["num_hidden_layers"]):
        _layer(layout, table, layer, cache)
    layout.join(f"{names.ENGINE_EMBEDDING}.weight", f"{table.embedding}.weight")
    layout.join(f"{names.ENGINE_FINAL_NORM}.weight", f"{table.final_norm}.weight")
    _head(layout, table, tied=bool(source_config.get("tie_word_embeddings")))
    layout.check_nothing_left()
    producer = quant_config.get("producer") or {"name": "unknown"}
    config = {"producer": producer, **_config(source_config, architecture, engine, layout, quantization)}
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


def _layer(layout: _Layout, table: TensorNames, layer: int, cache: KvCacheFormat) -> None:
    theirs, ours = f"{table.layers}.{layer}.", f"{names.ENGINE_LAYERS}.{layer}."
    for name, role in names.ENGINE_NORMS.items():
        if role in table.norms:
            layout.join(f"{ours}{name}.weight", f"{theirs}{table.norms[role]}.weight")
    for name, roles in names.ENGINE_LINEARS.items():
        _linear(layout, ours + name, [theirs + table.linears[role] for role in roles])
    if cache.quantized:
        # "Recommend default kv cache scaling factor to be 1": clamped as ModelOpt's TensorRT-LLM export does
        # (export/quant_utils.py, get_kv_cache_scaling_factor). TensorRT-LLM takes max(k, v) for both.
        k, v = (max(layout.scalar(f"{theirs}{table.attention}.{name}"), 1.0) for name in cache.unified)
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


def _head(layout: _Layout, table: TensorNames, *, tied: bool) -> None:
    """PretrainedModel.load takes a checkpoint without lm_head.weight, but leaves the weights as they were: so it is
    always written, from the embedding where the two are tied (as ModelOpt's TensorRT-LLM export does)."""
    source = f"{table.head}.weight"
    if source not in layout.source and tied:
        source = f"{table.embedding}.weight"
    layout.join(f"{names.ENGINE_HEAD}.weight", source)
    if layout.made[-1].dtype not in DTYPES:
        raise IntegrityError(f"{source} is quantized ({layout.made[-1].dtype}), and the output layer must not be.")
    layout.unquantized.append(names.ENGINE_HEAD)


def _config(
    source: Mapping[str, Any],
    architecture: Architecture,
    engine: Engine,
    layout: _Layout,
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """Every field that PretrainedConfig and the model's own configuration class read, none left to a default.

    logits_dtype is PretrainedConfig's default, which Triton's templates expect (TYPE_FP32); ModelOpt writes float16.
    """
    made = {tensor.name: tensor for tensor in layout.made}
    rotary_base, rotary_scaling = rope(source)
    defaults = architecture.config.defaults
    return {
        "architecture": engine.architecture,
        "dtype": DTYPES[made[f"{names.ENGINE_EMBEDDING}.weight"].dtype],
        "logits_dtype": "float32",
        **{key: source[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
        "num_key_value_heads": kv_heads(source),
        "head_size": head_size(source),
        "qk_layernorm": False,
        "intermediate_size": source["intermediate_size"],
        "hidden_act": source.get("hidden_act") or defaults["hidden_act"],
        "norm_epsilon": source.get("rms_norm_eps") or defaults["rms_norm_eps"],
        **_biases(made, engine),
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
        **{key: source.get(key, value) for key, value in engine.config.items()},
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


def _biases(made: Mapping[str, NewTensor], engine: Engine) -> dict[str, bool]:
    """attn_bias and mlp_bias. Each stands for several linear layers of all decoder layers, which must agree."""
    has = {linear: _bias(made, linear) for linear in names.ENGINE_LINEARS}
    dense = has["attention.qkv"] and engine.output_bias
    wanted = {**has, "attention.dense": dense, "mlp.gate": has["mlp.fc"], "mlp.proj": has["mlp.fc"]}
    if has != wanted:
        raise UnsupportedError(f"TensorRT-LLM's {engine.architecture} has no place for these biases: {has}.")
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
