"""TensorRT-LLM's layout -> the unified one: the inverse of `layouts.write_tensorrt_llm`, bit for bit.

Two things can't come back. KV cache scales below 1 are 1 in TensorRT-LLM's layout (formats/kv_cache.py, least_scale).
ModelOpt's own TensorRT-LLM export of AWQ models keeps the scales of inputs that its Hugging Face export folds into the
norms, and the Hugging Face layout has no place for them: such a checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.architectures import names, served, shapes
from builder.architectures.facts import Role, TensorNames
from builder.checkpoint.joining import Joined
from builder.checkpoint.layouts import ONES, QUANT_CFG, read_json
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor
from builder.formats import kv_cache
from builder.formats.base import NumberFormat, StoredTensor
from builder.formats.declared import MIXED, DeclaredFormats, declared


def unified_parts(tensorrt_llm: Path, source_config: Mapping[str, Any]) -> tuple[list[NewTensor], dict[str, Any]]:
    """The tensors of the unified layout, read when they are written, and the content of its hf_quant_config.json.

    tensorrt_llm: a directory with config.json and rank*.safetensors, of any tensor and pipeline parallel size.
    source_config: the source model's config.json. UnsupportedError for an architecture or format without such a layout
    and for AWQ scales that are not folded; IntegrityError if tensors are missing, or if the two configurations are not
    of one model.
    """
    architecture, _ = served.check_engine(source_config)
    assert architecture.tensors is not None
    table, config = architecture.tensors, read_json(tensorrt_llm / "config.json")
    _check_same_model(config, source_config)
    quantization = dict(config.get("quantization") or {})
    if quantization.get("quant_algo") == MIXED:
        quantization |= read_json(tensorrt_llm / QUANT_CFG)
    sizes = {role: (out.size, into.size) for role, (out, into) in shapes.linears(source_config).items()}
    layout = _Unified(Joined(tensorrt_llm, config), declared(quantization), sizes)
    layout.copy(names.ENGINE_EMBEDDING + ".weight", f"{table.embedding}.weight")
    layout.copy(names.ENGINE_FINAL_NORM + ".weight", f"{table.final_norm}.weight")
    if not source_config.get("tie_word_embeddings"):
        layout.copy(names.ENGINE_HEAD + ".weight", f"{table.head}.weight")
    cache = kv_cache.of_checkpoint(quantization.get("kv_cache_quant_algo"))
    for layer in range(config["num_hidden_layers"]):
        _layer(layout, table, layer, cache.tensorrt_llm, cache.unified)
    layout.check_nothing_left(tied=bool(source_config.get("tie_word_embeddings")))
    return layout.made, {"producer": config.get("producer") or {}, "quantization": _quantization(layout, quantization)}


@dataclass
class _Unified:
    """The unified tensors made so far. formats: of the linear layers, by their Hugging Face names, in order."""

    source: Joined
    declared: DeclaredFormats
    sizes: Mapping[Role, tuple[int, int]]
    made: list[NewTensor] = field(default_factory=list)
    formats: dict[str, NumberFormat] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def copy(self, name: str, new: str, *, shape: tuple[int, ...] | None = None) -> None:
        """Makes a tensor of the same bytes under another name."""
        info = self._info(name)
        self.made.append(NewTensor(new, info.dtype, info.shape if shape is None else shape, self.source.chunks(name)))

    def split(self, name: str, new: Sequence[str], rows: Sequence[int], dtype: str | None = None) -> None:
        """Makes several tensors of one, by rows of dimension 0; `dtype`: how the same bytes are called there."""
        info, start = self._info(name), 0
        if sum(rows) != info.shape[0]:
            raise IntegrityError(f"{name} has {info.shape[0]} rows, not {' + '.join(map(str, rows))}.")
        for one, count in zip(new, rows, strict=True):
            shape, chunks = (count, *info.shape[1:]), self.source.chunks(name, start, start + count)
            self.made.append(NewTensor(one, dtype or info.dtype, shape, chunks))
            start += count

    def ones(self, name: str) -> bool:
        """Whether a vector holds nothing but ones."""
        info = self._info(name)
        return info.dtype in ONES and bytes(self.source.data(name)) == ONES[info.dtype] * info.shape[0]

    def check_nothing_left(self, *, tied: bool) -> None:
        """UnsupportedError if a tensor was not used: none may be dropped silently."""
        known = {f"{names.ENGINE_HEAD}.weight"} if tied else set()
        left = sorted(n for n in self.source.names if n not in self.used | known and "cache_scaling_factor" not in n)
        if left:
            raise UnsupportedError(
                f"{len(left)} tensors have no place in the Hugging Face layout: {', '.join(left[:10])}.",
                why="The model has parts that its architecture usually does not have.",
            )

    def _info(self, name: str) -> Any:
        if name not in self.source:
            raise IntegrityError(f"The TensorRT-LLM checkpoint lacks {name}.", hint="Copy the checkpoint again.")
        self.used.add(name)
        return self.source.info(name)


def _layer(layout: _Unified, table: TensorNames, layer: int, scales: Sequence[str], unified: Sequence[str]) -> None:
    """Makes the tensors of one decoder layer. scales, unified: the KV cache's, in the two layouts."""
    theirs, ours = f"{names.ENGINE_LAYERS}.{layer}.", f"{table.layers}.{layer}."
    for name, norm in names.ENGINE_NORMS.items():
        if norm in table.norms:
            layout.copy(f"{theirs}{name}.weight", f"{ours}{table.norms[norm]}.weight")
    for name, roles in names.ENGINE_LINEARS.items():
        _linear(layout, theirs + name, {role: ours + table.linears[role] for role in roles})
    for name, new in zip(scales, unified, strict=False):  # the third is the larger of the two
        layout.copy(f"{theirs}attention.{name}", f"{ours}{table.attention}.{new}", shape=())


def _linear(layout: _Unified, name: str, modules: Mapping[Role, str]) -> None:
    """Makes the tensors of the projections that a layer consists of."""
    weight = f"{name}.weight"
    kind = layout.source.info(weight).dtype if weight in layout.source else ""
    number_format = layout.declared.stored(name, kind)
    layout.formats |= dict.fromkeys(modules.values(), number_format)
    outputs = [layout.sizes[role][0] for role in modules]
    if f"{name}.bias" in layout.source:
        layout.split(f"{name}.bias", [f"{module}.bias" for module in modules.values()], outputs)
    for tensor in number_format.tensors:
        stored = f"{name}.{tensor.tensorrt_llm}"
        if tensor.optional and (stored not in layout.source or _folded(layout, stored, tensor, modules)):
            continue
        new = [f"{module}.{tensor.unified}" for module in modules.values()]
        if tensor.per_output:
            dtype = tensor.dtypes[0] if tensor.tensorrt_llm_dtype else None
            layout.split(stored, new, [size // tensor.dims[0].group for size in outputs], dtype)
        else:
            for one in new:
                layout.copy(stored, one, shape=None if tensor.tensorrt_llm_shape is None else ())


def _folded(layout: _Unified, name: str, tensor: StoredTensor, modules: Mapping[Role, str]) -> bool:
    """Whether a tensor is only there because TensorRT-LLM's layers have it: its scales are folded into the norm."""
    if not any(role in tensor.folded for role in modules):
        return False
    if layout.ones(name):
        return True
    raise UnsupportedError(
        f"{name} has scales of AWQ that the Hugging Face layout has no place for.",
        why="Servers of that layout expect them in the weights of the norm; ModelOpt's TensorRT-LLM export keeps them.",
        hint="Serve it as it is, or export the model with ModelOpt's export_hf_checkpoint.",
    )


def _check_same_model(config: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    wrong = [f"{key} {config.get(key)} and {source.get(key)}" for key in keys if config.get(key) != source.get(key)]
    if wrong:
        raise IntegrityError(
            f"The checkpoint is not of this model: {', '.join(wrong)}.",
            hint="Name the directory of the model that it was made from.",
        )


def _quantization(layout: _Unified, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What hf_quant_config.json says, as ModelOpt writes it (export/quant_utils.py, process_layer_quant_config)."""
    cache = quantization.get("kv_cache_quant_algo")
    quantized = {name: one for name, one in layout.formats.items() if one.quant_algo is not None}
    used = list(dict.fromkeys(quantized.values()))
    if len(used) != 1 or not used[0].whole_model:
        listed = {name: one.layer_entry for name, one in quantized.items()}
        return {"quant_algo": MIXED, "kv_cache_quant_algo": cache, "quantized_layers": listed}
    excluded = [name for name in layout.formats if name not in quantized]
    return {**used[0].layer_entry, "kv_cache_quant_algo": cache, "exclude_modules": [names.ENGINE_HEAD, *excluded]}
