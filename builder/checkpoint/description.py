"""What a quantized checkpoint is, from its configuration files and tensor headers alone. Pure.

Works for a directory and for what ranged reads from the Hub return. Three layouts are known:

`unified`             ModelOpt's Hugging Face export: hf_quant_config.json, quantization_config in config.json, or both.
`tensorrt_llm`        config.json with `architecture` and `quantization`, rank*.safetensors.
`compressed_tensors`  quantization_config with the quant_method compressed-tensors: llm-compressor and others.

Where a fact stands in two files, both are read and compared: `contradictions` says where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.facts import Architecture
from builder.checkpoint.compressed_tensors import config as compressed_tensors
from builder.checkpoint.layouts import read_json
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import listed
from builder.core.safetensors_io import TensorInfo, Tensors, read_header
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED, DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat
from builder.model.quantization_signs import CONFIG, DOCUMENTS, HF_QUANT_CONFIG, QUANT_CFG, Layout, layout_of

__all__ = ["CONFIG", "DOCUMENTS", "HF_QUANT_CONFIG", "QUANT_CFG", "Layout", "layout_of"]

TITLES: Mapping[Layout, str] = {
    "unified": "ModelOpt's Hugging Face layout",
    "tensorrt_llm": "TensorRT-LLM's layout",
    "compressed_tensors": "the compressed-tensors layout",
}
# The first parts of module names that differ between a checkpoint's tensors and its configuration: a multimodal model's
# language model is saved as model.language_model.layers, and was quantized as model.layers or language_model.layers
# (vllm/model_executor/layers/quantization/modelopt.py, is_layer_excluded).
_PREFIXES = re.compile(r"^(?:model\.|language_model\.)+")
# Tools that write ModelOpt's layouts: their names in `producer`. The second is `builder convert`, for checkpoints of
# llm-compressor.
TOOLS = ("modelopt", "trtllm-builder")
UNNAMED = "unknown"  # what layouts.write_tensorrt_llm writes where the unified layout names no tool


@dataclass(frozen=True)
class Producer:
    """The tool that wrote a checkpoint, as the checkpoint says; "" where it does not."""

    name: str = ""
    version: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.version) if part) or "a tool that left no name"


@dataclass(frozen=True)
class Description:
    """A quantized checkpoint before any weight is read.

    config: config.json. formats: what the configuration declares. cache: the declared format of the KV cache. headers:
    {tensor: TensorInfo}; of a TensorRT-LLM checkpoint in several ranks, those of rank 0. contradictions: sentences,
    where configuration files disagree with each other or with the tensors.
    """

    layout: Layout
    config: Mapping[str, Any]
    formats: DeclaredFormats
    cache: KvCacheFormat
    headers: Mapping[str, TensorInfo]
    producer: Producer = Producer()
    contradictions: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> Mapping[str, NumberFormat]:
        """{linear layer: the format that it is stored in}, by the layer's name in this layout."""
        found = _linears(self.layout, self.config, self.headers)
        return {module: self.formats.stored(module, info.dtype) for module, info in found.items()}

    @property
    def has_cache_scales(self) -> bool:
        """Whether the scales of the KV cache are stored. Without them every server uses 1."""
        leaves = tuple(f".{leaf}" for leaf in _cache_leaves(self.layout))
        return any(name.endswith(leaves) for name in self.headers)

    @property
    def served_cache(self) -> KvCacheFormat:
        """The KV cache that the checkpoint can be served with: the declared one if its scales are there."""
        return self.cache if self.has_cache_scales else kv_cache.AUTO


def describe(
    documents: Mapping[str, Any], headers: Mapping[str, TensorInfo], where: str = "The checkpoint"
) -> Description:
    """The description of a checkpoint from its parsed DOCUMENTS, those that it has, and its tensor headers.

    where: its name in messages. UnsupportedError for a layout, tool, format or group size that is not supported;
    IntegrityError for a configuration that can't be read.
    """
    config = catalog.with_common_keys(_mapping(documents.get(CONFIG, {}), f"{where}/{CONFIG}"))
    layout = layout_of(documents)
    if layout is None:
        raise UnsupportedError(
            f"{where} has no quantization that is known here.",
            why=f"{HF_QUANT_CONFIG} and config.json describe neither ModelOpt's nor TensorRT-LLM's layout, nor that of "
            "compressed-tensors.",
            hint="Give a checkpoint that ModelOpt or llm-compressor wrote, or the original model.",
        )
    if layout == "compressed_tensors":
        return _compressed(config, headers, where)
    said = _statements(documents, where, layout)
    architecture = catalog.of(config)
    known = [replace(one, formats=_formats(one, layout, architecture)) for one in said]
    first = next((one for one in known if one.formats is not None), None)
    if first is None:
        raise IntegrityError(
            f"{where}/{said[0].file} says {MIXED} and lists no layers.",
            why=f"The format of each layer should be in its quantized_layers, or in {QUANT_CFG}.",
            hint="Copy or download the whole checkpoint again, with its *.json files.",
        )
    assert first.formats is not None
    producer = _producer(documents, where)
    found = Description(layout, config, first.formats, _cache(first, where), headers, producer)
    return replace(found, contradictions=(*_disagreements(found, known), *against_tensors(found)))


def describe_directory(path: Path) -> Description:
    """The description of a local checkpoint in one layout. Raises what `describe` raises, and IntegrityError for files
    that are damaged."""
    documents = {name: read_json(path / name) for name in DOCUMENTS if (path / name).is_file()}
    ranks = sorted(path.glob("rank*.safetensors"))
    headers = read_header(ranks[0]) if ranks else dict(Tensors(path))
    return describe(documents, headers, str(path))


@dataclass(frozen=True)
class _Statement:
    """What one configuration file says of the quantization, in the words of hf_quant_config.json."""

    file: str
    quantization: Mapping[str, Any]
    formats: DeclaredFormats | None = None  # None if the file does not list the layers


def _statements(documents: Mapping[str, Any], where: str, layout: Layout) -> list[_Statement]:
    """What each file says, the one that TensorRT-LLM reads first: hf_quant_config.json, then config.json
    (_torch/model_config.py, from_pretrained). quant_cfg.json adds the layers of MIXED_PRECISION."""
    found = []
    config = documents.get(CONFIG, {})
    if layout == "tensorrt_llm":
        found.append(_Statement(CONFIG, _normal(config["quantization"], f"{where}/{CONFIG}")))
    if HF_QUANT_CONFIG in documents:
        content = _mapping(documents[HF_QUANT_CONFIG], f"{where}/{HF_QUANT_CONFIG}")
        found.append(_Statement(HF_QUANT_CONFIG, _normal(content.get("quantization"), f"{where}/{HF_QUANT_CONFIG}")))
    block = config.get("quantization_config")
    if layout == "unified" and block:
        found.append(_Statement(CONFIG, _of_block(_mapping(block, f"{where}/{CONFIG}"), f"{where}/{CONFIG}")))
    if QUANT_CFG in documents:
        listed = _mapping(documents[QUANT_CFG], f"{where}/{QUANT_CFG}")
        base = {**found[0].quantization, "quantized_layers": None} if found else {}
        found.append(_Statement(QUANT_CFG, {**base, **_normal(listed, f"{where}/{QUANT_CFG}")}))
    return [_with_group_size(one, found) for one in found]


def _with_group_size(said: _Statement, others: Sequence[_Statement]) -> _Statement:
    """A statement that leaves the group size out has that of another file: ModelOpt's config.json has none of AWQ's
    (export/convert_hf_config.py, 0.37 to 0.47)."""
    algo, size = (said.quantization.get(key) for key in ("quant_algo", "group_size"))
    same = [one.quantization for one in others if one.quantization.get("quant_algo") == algo]
    known = next((one["group_size"] for one in same if one.get("group_size") is not None), None)
    if size is not None or known is None:
        return said
    return replace(said, quantization={**said.quantization, "group_size": known})


def _of_block(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    """quantization_config of config.json as ModelOpt 0.35 to 0.47 write it: flat, in the keys of compressed-tensors
    (export/convert_hf_config.py), or with hf_quant_config.json's own content inside."""
    if isinstance(block.get("quantization"), Mapping):
        return _normal(block["quantization"], where)
    groups = [one for one in _mapping(block.get("config_groups") or {}, where).values() if isinstance(one, Mapping)]
    sizes = {weights.get("group_size") for one in groups if isinstance(weights := one.get("weights"), Mapping)}
    scheme = block.get("kv_cache_scheme") or block.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        scheme = "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else str(dict(scheme))
    stated = {
        "quant_algo": block.get("quant_algo"),
        "group_size": block.get("group_size", sizes.pop() if len(sizes) == 1 else None),
        "kv_cache_quant_algo": scheme,
        "exclude_modules": block.get("ignore") or block.get("exclude_modules"),
        "quantized_layers": block.get("quantized_layers"),
    }
    return _normal(stated, where)


def _normal(quantization: Any, where: str) -> dict[str, Any]:
    """A `quantization` with its types checked, names of formats in capitals. IntegrityError for another type."""
    found = dict(_mapping(quantization, where))
    layers = _mapping(found.get("quantized_layers") or {}, where)
    excluded = found.get("exclude_modules") or []
    if not isinstance(excluded, Sequence) or isinstance(excluded, str) or not all(isinstance(n, str) for n in excluded):
        raise _unreadable(where, "exclude_modules is not a list of names")
    for key in ("quant_algo", "kv_cache_quant_algo"):
        if not isinstance(found.get(key), str | None):
            raise _unreadable(where, f"{key} is not a name")
        found[key] = found[key].upper() if found.get(key) else None  # ModelOpt writes fp8_pb_wo in small letters
    entries = {
        name: {**_mapping(e, where), "quant_algo": str(e.get("quant_algo")).upper()} for name, e in layers.items()
    }
    return {**found, "exclude_modules": list(excluded), "quantized_layers": entries}


def _formats(said: _Statement, layout: Layout, architecture: Architecture) -> DeclaredFormats | None:
    if said.quantization.get("quant_algo") == MIXED and not said.quantization.get("quantized_layers"):
        return None
    aliases = partial(_aliases, architecture) if layout == "unified" else _same_name
    return declared(said.quantization, aliases)


def _same_name(module: str) -> Sequence[str]:
    return ()


def _aliases(architecture: Architecture, module: str) -> Sequence[str]:
    """What a configuration may call a module: without model. and language_model., or the layer that it is fused to."""
    short = _PREFIXES.sub("", module)
    fused = names.fused_name(architecture, module)
    found = [short, f"model.{short}", f"language_model.{short}", f"language_model.model.{short}"]
    if fused:
        found += [f"{name.rpartition('.')[0]}.{fused}" for name in (module, *found)]
    return tuple(name for name in dict.fromkeys(found) if name != module)


def _cache(said: _Statement, where: str) -> KvCacheFormat:
    algo = said.quantization.get("kv_cache_quant_algo")
    found = kv_cache.of_algo(algo)
    if found is None:
        raise UnsupportedError(
            f"{where} has a KV cache in {algo}, which is not supported.",
            why=f"Supported: {', '.join(str(one.quant_algo) for one in kv_cache.FORMATS.values() if one.quantized)}.",
            hint="Give a checkpoint with another KV cache, or the original model.",
        )
    return found


def _producer(documents: Mapping[str, Any], where: str) -> Producer:
    """The tool that the files name. UnsupportedError for one that is not known to write this layout."""
    config = documents.get(CONFIG, {})
    holders = (documents.get(HF_QUANT_CONFIG, {}), config.get("quantization_config") or {}, config)
    stated: Mapping[str, Any] = next(
        (one["producer"] for one in holders if isinstance(one.get("producer"), Mapping)), {}
    )
    found = Producer(str(stated.get("name") or "")[:60], str(stated.get("version") or "")[:60])
    if found.name and found.name.lower() not in (*TOOLS, UNNAMED):
        raise UnsupportedError(
            f"{where} was written by {ascii(str(found))[1:-1]}, a tool that is not known here.",
            why=f"Its files have the form of ModelOpt's. Known tools: {', '.join(TOOLS)}; another one may "
            "mean something else by the same names.",
            hint="Quantize the original model instead, or give a checkpoint that ModelOpt or llm-compressor wrote.",
        )
    if found.name.lower() == "modelopt" and re.match(r"[1-9]", found.version):
        raise UnsupportedError(
            f"{where} was written by {ascii(str(found))[1:-1]}, a version that is not known here.",
            why="ModelOpt 0.x wrote the layouts that are supported.",
            hint="Give a checkpoint of ModelOpt 0.x, or quantize the original model.",
        )
    return found


def _disagreements(found: Description, said: Sequence[_Statement]) -> list[str]:
    """Where the files disagree about the KV cache, the format of all layers, or that of single ones."""
    first, *others = [one for one in said if one.formats is not None]
    known = _linears(found.layout, found.config, found.headers)
    sentences = []
    for other in (one for one in said if one is not first):
        for key in ("quant_algo", "kv_cache_quant_algo"):
            one, two = (statement.quantization.get(key) for statement in (first, other))
            if one != two:
                sentences.append(f"{first.file} says {key} {one}, and {other.file} says {two}.")
    for other in others:
        assert first.formats is not None
        assert other.formats is not None
        pairs = {module: (first.formats.of(module), other.formats.of(module)) for module in known}
        if differing := [module for module, (one, two) in pairs.items() if one is not two]:
            one, two = pairs[differing[0]]
            sentences.append(f"{first.file} says {one.title} and {other.file} says {two.title} of {listed(differing)}.")
    return sentences


def against_tensors(found: Description) -> list[str]:
    """Where the tensors contradict the configuration: nothing is quantized, or a layer is that should not be."""
    known = _linears(found.layout, found.config, found.headers)
    stored = found.layers
    quantized = {module for module, one in stored.items() if one.quant_algo is not None}
    if known and not quantized and found.formats.used:
        titles = " and ".join(one.title for one in found.formats.used)
        return [f"The configuration says {titles}, and no tensor of a linear layer is quantized."]
    odd = [m for m, info in known.items() if info.dtype not in stored[m].weight.dtypes]
    odd += [m for m in quantized if found.formats.of(m).quant_algo is None]
    if odd:
        kind = known[odd[0]].dtype
        return [f"The configuration says {found.formats.of(odd[0]).title} of {listed(odd)}; stored is {kind}."]
    return []


def _linears(layout: Layout, config: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """{linear layer: header of its weight}, by its name in this layout."""
    is_linear = _is_linear(layout, catalog.of(config))
    found = {}
    for name, info in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", "weight_packed") and len(info.shape) == 2 and is_linear(module, info.shape):
            found[module] = info
    return found


def _is_linear(layout: Layout, architecture: Architecture) -> Callable[[str, Sequence[int]], bool]:
    if layout == "tensorrt_llm":
        return lambda module, shape: module.endswith(tuple(f".{name}" for name in names.ENGINE_LINEARS))
    return lambda module, shape: names.is_quantizable(architecture, f"{module}.weight", shape)


def _cache_leaves(layout: Layout) -> tuple[str, ...]:
    """The last parts of the names of the KV cache's scales."""
    if layout == "compressed_tensors":
        return ("k_scale", "v_scale")
    scales = (one.tensorrt_llm if layout == "tensorrt_llm" else one.unified for one in kv_cache.FORMATS.values())
    return tuple(dict.fromkeys(name.rpartition(".")[2] for found in scales for name in found))


def _compressed(config: Mapping[str, Any], headers: Mapping[str, TensorInfo], where: str) -> Description:
    block = _mapping(config.get("quantization_config") or config.get("compression_config"), f"{where}/{CONFIG}")
    modules = _linears("compressed_tensors", config, headers)
    formats, cache = compressed_tensors.declared(block, modules), compressed_tensors.cache_of(block)
    stated = block.get("producer")  # our own conversions keep it
    known = stated if isinstance(stated, Mapping) else {"name": "compressed-tensors", "version": block.get("version")}
    tool = Producer(str(known.get("name") or "")[:60], str(known.get("version") or "")[:60])
    found = Description("compressed_tensors", config, formats, cache, headers, tool)
    return replace(found, contradictions=tuple(against_tensors(found)))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _unreadable(where, f"it holds a {type(value).__name__} where an object is expected")
    return value


def _unreadable(where: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{where} does not describe a quantization.", why=f"{why}.", hint="Copy or download the checkpoint again."
    )
