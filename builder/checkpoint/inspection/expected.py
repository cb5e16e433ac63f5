"""Which tensors a layout must have, by its configuration and architecture, with their dtypes and shapes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from builder.architectures import names
from builder.checkpoint import sharding
from builder.checkpoint.compressed_tensors.config import SHAPE
from builder.checkpoint.inspection.layout import Layout
from builder.checkpoint.layout_names import LayoutNames
from builder.core.safetensors_io import TensorInfo
from builder.formats.base import FLOATS, SCALAR, Content, NumberFormat, StoredTensor


@dataclass(frozen=True)
class Expected:
    """What a tensor must be.

    label: the kind of tensor that the summary counts its bytes as; None if that follows from its name. module, stored:
    the linear layer that it belongs to and what it is of it. linear: the format of the layer whose weight it is.
    known: whether some layer needs it; other tensors are checked by their dtype alone. numbers: the integers in it.
    """

    content: Content
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None
    label: str | None = None
    module: str = ""
    stored: StoredTensor | None = None
    linear: NumberFormat | None = None
    known: bool = True
    numbers: tuple[int, ...] | None = None


KV_SCALE = Expected("scale", ("F32",), SCALAR, "kv_scales")
# compressed-tensors keeps scales in the model's dtype, where it is not told another (0.18, quantization/lifecycle).
KV_SCALE_COMPRESSED = replace(KV_SCALE, dtypes=FLOATS)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def of(layout: Layout) -> dict[str, Expected]:
    """{tensor: what it must be}: of a known architecture by its table, of others by the layers that are there."""
    found = _from_config(layout, layout.names) if layout.names else _from_tensors(layout)
    return {name: want for name, want in found.items() if name in layout.tensors or not _may_lack(layout, want)}


def by_dtype(name: str, info: TensorInfo) -> Expected:
    """For a tensor that is not expected: its values are checked too."""
    if name.endswith((".k_scale", ".v_scale", "_cache_scaling_factor")):
        return replace(KV_SCALE, dtypes=(info.dtype,), known=False)
    if info.dtype == "F8_E4M3":
        return Expected("block_scales", (info.dtype,), label="block_scales", known=False)
    return Expected("floats", (info.dtype,), known=False)


def is_kv_scale(want: Expected) -> bool:
    """Whether this is a scale of the KV cache."""
    return want.label == "kv_scales"


def _may_lack(layout: Layout, want: Expected) -> bool:
    """Whether a layer need not have this tensor: what ModelOpt folds, and KV scales that no layer of a Hugging Face
    layout has (ModelOpt's recipes "cast" write none)."""
    if is_kv_scale(want):
        return not layout.tensorrt_llm and not layout.said.has_cache_scales
    stored = want.stored
    if stored is None or not stored.optional:
        return False
    # Where TensorRT-LLM's layers always have it: all of an engine, and of its LLM class those that no norm feeds.
    folded = names.role(layout.architecture, want.module) in stored.folded
    return not stored.filled or (folded and not layout.tensorrt_llm)


def _from_config(layout: Layout, known: LayoutNames) -> dict[str, Expected]:
    """All tensors of a known architecture with their shapes; for a rank, those that it holds."""
    config = layout.config
    parallel = sharding.parallel_of(config)
    pp_rank, tp_rank = divmod(layout.rank, parallel.tp)
    first, last = pp_rank == 0, pp_rank == parallel.pp - 1
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    expected = {f"{known.embedding}.weight": _float(vocab, hidden)} if first else {}
    if last:
        expected[f"{known.final_norm}.weight"] = _float(hidden)
    tied = not layout.tensorrt_llm and config.get("tie_word_embeddings")
    if f"{known.head}.weight" in layout.tensors or (last and not tied):
        expected[f"{known.head}.weight"] = _float(vocab, hidden)
    for layer in range(len(parallel.layers(pp_rank, config["num_hidden_layers"]))):
        prefix = f"{known.layers}.{layer}."
        expected |= {f"{prefix}{name}.weight": _float(size) for name, size in known.norms.items()}
        for name, (out_features, in_features) in known.linears.items():
            expected |= _linear(layout, prefix + name, out_features, in_features)
            if name in known.biases:
                expected[f"{prefix}{name}.bias"] = _float(out_features)
        expected |= _cache(layout, prefix + known.attention)
    return {name: _share(name, want, config, parallel.tp, tp_rank) for name, want in expected.items()}


def _share(name: str, want: Expected, config: Mapping[str, Any], tp: int, tp_rank: int) -> Expected:
    """What a tensor parallel rank holds of an expected tensor."""
    if tp == 1 or not want.shapes or want.shapes == SCALAR:
        return want
    shapes = tuple(sharding.shard(name, whole, config, tp, tp_rank).shape(whole) for whole in want.shapes)
    return replace(want, shapes=shapes)


def _float(*shape: int) -> Expected:
    return Expected("floats", FLOATS, (shape,))


def _cache(layout: Layout, attention: str) -> dict[str, Expected]:
    scale = KV_SCALE_COMPRESSED if layout.compressed else KV_SCALE
    return {f"{attention}.{name}": scale for name in layout.cache_scales()}


def _linear(layout: Layout, module: str, out_features: int, in_features: int) -> dict[str, Expected]:
    number_format, weight = layout.format_of(module), (out_features, in_features)
    return _weight_shape(layout, module, weight) | {
        f"{module}.{layout.leaf(tensor)}": Expected(
            tensor.content,
            _dtypes(layout, tensor),
            _shapes(layout, tensor, weight),
            tensor.label,
            module=module,
            stored=tensor,
            linear=number_format if tensor is number_format.weight else None,
        )
        for tensor in number_format.tensors
    }


def _weight_shape(layout: Layout, module: str, weight: tuple[int, int]) -> dict[str, Expected]:
    """The shape that compressed-tensors stores beside a packed weight."""
    scheme, name = layout.format_of(module).compressed_tensors, f"{module}.{SHAPE}"
    if not (layout.compressed and scheme and scheme.has_shape):
        return {}
    return {name: Expected("integers", ("I64", "I32"), ((2,),), "shapes", numbers=weight)}


def _dtypes(layout: Layout, tensor: StoredTensor) -> tuple[str, ...]:
    if layout.tensorrt_llm and tensor.tensorrt_llm_dtype:
        return (tensor.tensorrt_llm_dtype,)
    loose = layout.compressed and set(tensor.dtypes) <= set(FLOATS)
    return FLOATS if loose else tensor.dtypes


def _shapes(layout: Layout, tensor: StoredTensor, weight: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes that it may have. compressed-tensors writes a scale of each output as a column."""
    shapes = tensor.shapes(weight)
    if layout.compressed and tensor.axes == ("out",):
        return (*shapes, (*shapes[0], 1))
    return shapes


def _weights(layout: Layout) -> Iterator[tuple[str, str, TensorInfo]]:
    """(module, leaf, header) of the two-dimensional weights that are there."""
    for name, info in layout.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", "weight_packed") and len(info.shape) == 2:
            yield module, leaf, info


def _from_tensors(layout: Layout) -> dict[str, Expected]:
    """For other decoders, from the tensors themselves: each linear layer must have all tensors of its format."""
    expected: dict[str, Expected] = {}
    for module, leaf, info in _weights(layout):
        number_format = layout.format_of(module)
        stored = number_format.quant_algo is not None and info.dtype in _dtypes(layout, number_format.weight)
        if stored or names.is_quantizable(layout.architecture, f"{module}.weight", info.shape):
            weight = number_format.weight.weight_shape(info.shape) if stored else info.shape
            made = _linear(layout, module, weight[0], weight[1])
            if leaf != layout.leaf(number_format.weight):  # the layer is not stored as declared
                made = {f"{module}.{leaf}": replace(made[f"{module}.{layout.leaf(number_format.weight)}"], shapes=None)}
            expected |= made
        attention, _, projection = module.rpartition(".")
        # ModelOpt uses k_proj and v_proj for Phi-3 and for DeepSeek's latent attention too.
        if projection in (("qkv",) if layout.tensorrt_llm else ("k_proj", "qkv_proj", "kv_b_proj")):
            expected |= _cache(layout, attention)
    expected |= _stacked(layout)
    for layer in range(layout.config.get("num_hidden_layers", 0)) if not layout.tensorrt_llm else ():
        if not any(f".layers.{layer}." in name for name in layout.tensors) and not layout.opened.incomplete:
            layout.report(f"layer {layer}", "has no tensor", "missing")
    return expected


def _stacked(layout: Layout) -> dict[str, Expected]:
    """Experts that ModelOpt writes in one parameter, with the scales of all of them beside it."""
    experts, found = layout.architecture.experts, {}
    for name, info in layout.tensors.items() if experts and not experts.apart else ():
        number_format = layout.formats.of(name)
        if len(info.shape) != 3 or info.dtype not in number_format.weight.dtypes or number_format.quant_algo is None:
            continue
        for tensor in number_format.tensors:
            own = name if tensor is number_format.weight else f"{name}_{tensor.unified}"
            shapes = None if len(tensor.axes) == 2 else SCALAR
            found[own] = Expected(tensor.content, tensor.dtypes, shapes, "experts")
    return found
