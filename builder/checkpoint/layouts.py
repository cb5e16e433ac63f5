"""The two layouts of a quantized checkpoint, and the conversion of the first into the second.

`unified/`       ModelOpt's export: Hugging Face names, `hf_quant_config.json`, one or more files.
`tensorrt_llm/`  the input of trtllm-build: `config.json`, `rank0.safetensors`; the same bytes under other names, and
                 ones where a format's input scales are folded into a norm (AWQ).
The number format of a linear layer defines its tensors (builder/formats), the architecture their names
(builder/architectures). If layers have different formats, both layouts say MIXED_PRECISION and list the format of each
layer in `quant_cfg.json`.
Standard library only: tensors are streamed, never loaded. Files named in comments are under `tensorrt_llm/` of
NVIDIA/TensorRT-LLM 1.x, or under `modelopt/torch/` of ModelOpt 0.37 and 0.47.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.architectures import names, served
from builder.architectures.attention import head_size, kv_heads, rope
from builder.architectures.facts import Architecture, Engine, TensorNames
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, overwrite, write
from builder.core.untrusted_text import parse_json, read_regular
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED, DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat

RANK_FILE = "rank0.safetensors"
SCALE_BYTES = 1 << 16  # no scale is larger that depends on calibration; small weights are rewritten with them
QUANT_CFG = "quant_cfg.json"  # beside config.json if quant_algo is MIXED_PRECISION
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
ONES = {"BF16": b"\x80\x3f", "F16": b"\x00\x3c", "F32": b"\x00\x00\x80\x3f"}


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model in both layouts. digest: of the contents of its files. facts: what the stage that made it
    recorded."""

    path: Path
    digest: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unified(self) -> Path:
        """The Hugging Face layout."""
        return self.path / "unified"

    @property
    def tensorrt_llm(self) -> Path:
        """The layout that trtllm-build reads."""
        return self.path / "tensorrt_llm"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; IntegrityError if the file is absent or holds something else."""
    try:
        content = parse_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} can't be read as JSON.", why=str(error)) from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} is not a JSON object.")
    return content


def hf_quant_config(unified: Path) -> dict[str, Any]:
    """hf_quant_config.json of a Hugging Face layout; without quantization where there is no such file."""
    file = unified / "hf_quant_config.json"
    return read_json(file) if file.is_file() else {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}


def write_tensorrt_llm(
    unified: Path,
    source_config: Mapping[str, Any],
    destination: Path,
    done: Callable[[int], object] = lambda nbytes: None,
    *,
    rescaled: bool = False,
) -> None:
    """Writes the TensorRT-LLM layout (config.json, rank0.safetensors) of a unified one to `destination`.

    source_config: the source model's config.json. done: called with the bytes of rank0.safetensors that are written.
    rescaled: the layout is there, and only scales have changed since.
    UnsupportedError for an architecture or number format without such a layout, IntegrityError if tensors are missing
    or disagree.
    """
    architecture, engine = served.check_engine(source_config)
    assert architecture.tensors is not None
    table = architecture.tensors
    quant_config = hf_quant_config(unified)
    quantization = quant_config.get("quantization") or {}
    formats, cache = declared(quantization), kv_cache.of_checkpoint(quantization.get("kv_cache_quant_algo"))
    check_formats(formats)
    tensors = Tensors(unified)
    embedding = tensors.get(f"{table.embedding}.weight")
    layout = _Layout(tensors, formats, embedding.dtype if embedding else "BF16")
    for layer in range(source_config["num_hidden_layers"]):
        _layer(layout, table, layer, cache)
    layout.join(f"{names.ENGINE_EMBEDDING}.weight", f"{table.embedding}.weight")
    layout.join(f"{names.ENGINE_FINAL_NORM}.weight", f"{table.final_norm}.weight")
    _head(layout, table, tied=bool(source_config.get("tie_word_embeddings")))
    layout.check_nothing_left()
    producer = quant_config.get("producer") or {"name": "unknown"}
    config = {"producer": producer, **_config(source_config, architecture, engine, layout, quantization)}
    destination.mkdir(parents=True, exist_ok=True)
    if rescaled:
        overwrite(destination / RANK_FILE, layout.made, SCALE_BYTES)
    else:
        write(destination / RANK_FILE, layout.made, done=done)
    if layout.whole_format is None:
        entries = {name: one.layer_entry for name, one in layout.formats.items()}
        write_quant_cfg(destination, {**config["quantization"], "quantized_layers": entries})
    write_json(destination / "config.json", config)


def check_formats(formats: DeclaredFormats) -> None:
    """UnsupportedError for formats that TensorRT-LLM has no layout of."""
    lacking = [one for one in formats.used if one.compressed_only]
    if lacking:
        raise UnsupportedError(
            f"TensorRT-LLM has no layout for {' and '.join(one.title for one in lacking)}.",
            why=lacking[0].targets_source,
            hint="Take the compressed-tensors layout, or quantize the original model to another --format.",
        )


def write_if_served(
    unified: Path,
    source_config: Mapping[str, Any],
    destination: Path,
    done: Callable[[int], object] = lambda nbytes: None,
    *,
    rescaled: bool = False,
) -> str | None:
    """`write_tensorrt_llm` for a model that an engine serves. Returns why there is no such layout, if so."""
    try:
        served.check_engine(source_config)
        rope(source_config)
        check_formats(declared(hf_quant_config(unified).get("quantization") or {}))
    except UnsupportedError as error:
        return error.what
    write_tensorrt_llm(unified, source_config, destination, done, rescaled=rescaled)
    return None


def write_quant_cfg(directory: Path, quantization: Mapping[str, Any]) -> None:
    """Writes quant_cfg.json, which TensorRT-LLM reads beside config.json if quant_algo is MIXED_PRECISION.

    For engines: models/modeling_utils.py, PretrainedConfig.from_json_file. For the Hugging Face layout, whose own list
    of layers 1.2 ignores: _torch/model_config.py, load_modelopt_quant_config.
    """
    keys = ("quant_algo", "kv_cache_quant_algo", "quantized_layers")
    write_json(directory / QUANT_CFG, {key: quantization.get(key) for key in keys})


class _Layout:
    """The TensorRT-LLM tensors made so far, and the unified tensors that were used for them."""

    def __init__(self, source: Tensors, declared: DeclaredFormats, dtype: str) -> None:
        self.source, self.declared, self.dtype = source, declared, dtype
        self.made: list[NewTensor] = []
        self.unquantized: list[str] = []
        self.formats: dict[str, NumberFormat] = {}  # of the quantized layers, by their TensorRT-LLM names
        self._used: set[str] = set()

    def join(self, name: str, *sources: str, dtype: str | None = None) -> None:
        """Makes a tensor from one or more, concatenated in dim 0; `dtype`: how the same bytes are called there."""
        infos = [self.source[s] for s in self._take(sources)]
        if len({(info.dtype, info.shape[1:]) for info in infos}) > 1:
            raise IntegrityError(f"{', '.join(sources)} differ in dtype or width, so they can't be joined to {name}.")
        shape = infos[0].shape
        if len(infos) > 1:
            shape = (sum(info.shape[0] for info in infos), *shape[1:])
        self.made.append(NewTensor(name, dtype or infos[0].dtype, shape, [self.source.place(s) for s in sources]))

    def ones(self, name: str, size: int) -> None:
        """Makes a tensor of ones [size], in the dtype of the embedding."""
        dtype = self.dtype
        self.made.append(NewTensor(name, dtype, (size,), [ONES[dtype] * size]))

    @property
    def whole_format(self) -> NumberFormat | None:
        """The format of all quantized layers; None if the formats of the layers must be listed."""
        used = set(self.formats.values())
        one = next(iter(used), self.declared.default)
        return one if one and one.whole_model and len(used) < 2 else None

    def agree(self, name: str, *sources: str, shape: tuple[int, ...] | None = None) -> None:
        """Makes a scalar from several that must be equal, because one GEMM has one global scale."""
        if len({self.source.read(s) for s in self._take(sources)}) > 1:
            raise IntegrityError(
                f"{', '.join(sources)} differ.",
                why=f"TensorRT-LLM computes them as one layer, which has one {name.rsplit('.', 1)[-1]}.",
                hint="Quantize again with a quantizer that shares the scales of q, k and v, as ModelOpt does.",
            )
        info = self.source[sources[0]]
        shape = info.shape if shape is None else shape
        self.made.append(NewTensor(name, info.dtype, shape, [self.source.place(sources[0])]))

    def scalar(self, source: str) -> float:
        """The value of an F32 scale, finite and positive."""
        self._take([source])
        data = self.source.read(source)
        value = float(struct.unpack("<f", data)[0]) if len(data) == 4 else math.nan
        if not (math.isfinite(value) and value > 0):
            raise IntegrityError(f"{source} is {value}; a scale must be finite and positive.", hint="Quantize again.")
        return value

    def _take(self, names: Iterable[str]) -> Iterable[str]:
        missing = [name for name in names if name not in self.source]
        if missing:
            raise IntegrityError(f"The quantized checkpoint lacks {', '.join(missing)}.", hint="Quantize again.")
        self._used.update(names)
        return names

    def check_nothing_left(self) -> None:
        """UnsupportedError if a tensor of the unified layout was not used: none may be dropped silently."""
        ignored = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")
        left = sorted(n for n in self.source if n not in self._used and not n.endswith(ignored))
        if left:
            raise UnsupportedError(
                f"{len(left)} tensors have no place in the TensorRT-LLM layout: {', '.join(left[:10])}.",
                why="The model has parts that its architecture usually does not have.",
            )


def _layer(layout: _Layout, table: TensorNames, layer: int, cache: KvCacheFormat) -> None:
    """Makes the tensors of one decoder layer."""
    theirs, ours = f"{table.layers}.{layer}.", f"{names.ENGINE_LAYERS}.{layer}."
    for name, role in names.ENGINE_NORMS.items():
        if role in table.norms:
            layout.join(f"{ours}{name}.weight", f"{theirs}{table.norms[role]}.weight")
    for name, roles in names.ENGINE_LINEARS.items():
        _linear(layout, ours + name, [theirs + table.linears[role] for role in roles])
    if cache.quantized:
        # TensorRT-LLM uses max(k, v) for both.
        least = cache.least_scale
        k, v = (max(layout.scalar(f"{theirs}{table.attention}.{name}"), least) for name in cache.unified)
        for name, value in zip(cache.tensorrt_llm, (k, v, max(k, v)), strict=True):
            data = struct.pack("<f", value)
            layout.made.append(NewTensor(f"{ours}attention.{name}", "F32", (1,), [data]))


def _linear(layout: _Layout, name: str, projections: list[str]) -> None:
    """Makes the weight, bias and scales of a linear layer from those of its projections."""

    def named(suffix: str) -> list[str]:
        return [f"{projection}.{suffix}" for projection in projections]

    info = layout.source.get(f"{projections[0]}.weight")
    number_format = layout.declared.stored(projections[0], info.dtype if info else "")
    layout.join(f"{name}.weight", *named("weight"), dtype=number_format.weight.tensorrt_llm_dtype)
    if any(bias in layout.source for bias in named("bias")):
        layout.join(f"{name}.bias", *named("bias"))
    if number_format.quant_algo is None:
        layout.unquantized.append(name)
        return
    layout.formats[name] = number_format
    for tensor in number_format.tensors[1:]:
        made, sources = f"{name}.{tensor.tensorrt_llm}", named(tensor.unified)
        if tensor.optional and not any(source in layout.source for source in sources):
            if tensor.filled and info:
                layout.ones(made, number_format.weight.weight_shape(info.shape)[1])
        elif tensor.per_output:
            layout.join(made, *sources, dtype=tensor.tensorrt_llm_dtype)
        else:
            layout.agree(made, *sources, shape=tensor.tensorrt_llm_shape)


def _head(layout: _Layout, table: TensorNames, *, tied: bool) -> None:
    """Makes lm_head.weight, from the embedding if the two are tied, as ModelOpt's TensorRT-LLM export does.

    PretrainedModel.load accepts a checkpoint without it, but then leaves the weights uninitialized.
    """
    source = f"{table.head}.weight"
    if source not in layout.source and tied:
        source = f"{table.embedding}.weight"
    layout.join(f"{names.ENGINE_HEAD}.weight", source)
    if layout.made[-1].dtype not in DTYPES:
        raise IntegrityError(f"{source} is quantized ({layout.made[-1].dtype}); the output layer must not be.")
    layout.unquantized.append(names.ENGINE_HEAD)


def _config(
    source: Mapping[str, Any],
    architecture: Architecture,
    engine: Engine,
    layout: _Layout,
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of config.json: every field that PretrainedConfig and the model's configuration class read, so that
    nothing depends on their defaults.

    logits_dtype: Triton's templates expect PretrainedConfig's default (TYPE_FP32); ModelOpt writes float16.
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
        # The nested form, `moe`, differs between versions; both configuration classes accept these two instead.
        "moe_num_experts": 0,
        "moe_top_k": 0,
        **{key: source.get(key, value) for key, value in engine.config.items()},
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": _quantization(layout, quantization.get("kv_cache_quant_algo")),
    }


def _quantization(layout: _Layout, kv_algo: str | None) -> dict[str, Any]:
    """The `quantization` field as ModelOpt writes it (export/model_config_export.py). If the formats of the layers
    differ, quant_cfg.json lists them."""
    one = layout.whole_format
    if one is None:
        return {"quant_algo": MIXED, "kv_cache_quant_algo": kv_algo}
    entry = {"quant_algo": one.quant_algo, "kv_cache_quant_algo": kv_algo, **one.layer_entry}
    if one.quant_algo is None:
        return entry
    return {**entry, "exclude_modules": sorted(layout.unquantized)}


def _biases(made: Mapping[str, NewTensor], engine: Engine) -> dict[str, bool]:
    """attn_bias and mlp_bias. Each covers several linear layers of all decoder layers, which must agree."""
    has = {linear: _bias(made, linear) for linear in names.ENGINE_LINEARS}
    dense = has["attention.qkv"] and engine.output_bias
    wanted = {**has, "attention.dense": dense, "mlp.gate": has["mlp.fc"], "mlp.proj": has["mlp.fc"]}
    if has != wanted:
        raise UnsupportedError(f"TensorRT-LLM's {engine.architecture} has no place for these biases: {has}.")
    return {"attn_bias": has["attention.qkv"], "mlp_bias": has["mlp.fc"]}


def _bias(made: Mapping[str, NewTensor], linear: str) -> bool:
    """Whether this linear layer has a bias, in all decoder layers. UnsupportedError if only some have it."""
    weights = [name for name in made if name.endswith(f"{linear}.weight")]
    with_bias = [name for name in weights if name.removesuffix("weight") + "bias" in made]
    if with_bias and with_bias != weights:
        raise UnsupportedError(f"Only some layers have a bias in {linear}.", why=", ".join(with_bias[:10]))
    return bool(with_bias)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file atomically; its mode follows the umask."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)
