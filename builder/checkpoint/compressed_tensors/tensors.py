"""Tensors of the unified layout <-> those of compressed-tensors: other names, scales as reciprocals, the same weights.

Weights, block scales, norms and embeddings are not touched: their bytes are copied from file to file. What a scale was
before is recorded in the file's header where it can't be computed back (`__metadata__`, key RECORD), so that a
conversion there and back gives the same bytes. Readers of safetensors ignore such entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from builder.checkpoint.compressed_tensors import scales
from builder.checkpoint.compressed_tensors.scales import WIDTH, Scale
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, TensorInfo, Tensors, read_metadata
from builder.formats.base import NumberFormat, StoredTensor
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16

RECORD = "converted_from"
BIAS = "bias"


@dataclass
class Made:
    """The tensors of the new layout. records: {tensor: what it was}, where that can't be computed from it.
    suspicious: the scales that are not finite and positive."""

    tensors: list[NewTensor] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    suspicious: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Way:
    """A direction: the last part of a tensor's name before and after, and the conversions of its scales."""

    to_compressed: bool

    def leaves(self, tensor: StoredTensor) -> tuple[str, str]:
        there = tensor.compressed_tensors or tensor.unified
        return (tensor.unified, there) if self.to_compressed else (there, tensor.unified)

    def cache(self, cache: KvCacheFormat) -> dict[str, str]:
        pairs = zip(cache.unified, cache.compressed_tensors, strict=True)
        return {a: b for a, b in pairs} if self.to_compressed else {b: a for a, b in pairs}

    def scale(self, tensor: StoredTensor | None) -> tuple[Callable[[Scale], Scale], Callable[[Scale], Scale]]:
        """Forward and backward."""
        there, back = partial(to_compressed, tensor), partial(to_unified, tensor)
        return (there, back) if self.to_compressed else (back, there)


def to_compressed(tensor: StoredTensor | None, scale: Scale) -> Scale:
    """A unified scale as compressed-tensors stores it: [1] or [outputs, 1]. tensor: None for a scale of the KV cache."""
    made = scales.multiplier_to_divisor(scale) if tensor is not None and tensor.reciprocal else scales.widened(scale)
    column = tensor is not None and bool(tensor.dims)
    return Scale(made.dtype, (len(made.data) // 4, 1) if column else (1,), made.data)


def to_unified(tensor: StoredTensor | None, scale: Scale) -> Scale:
    """The inverse: [] or [outputs], F32."""
    made = scales.divisor_to_multiplier(scale) if tensor is not None and tensor.reciprocal else scales.widened(scale)
    column = tensor is not None and bool(tensor.dims)
    return Scale(made.dtype, (len(made.data) // 4,) if column else (), made.data)


def convert(source: Tensors, layers: Mapping[str, NumberFormat], cache: KvCacheFormat, *, to_compressed: bool) -> Made:
    """All tensors in the other layout. layers: {linear layer: the format that it is stored in}.

    UnsupportedError for a tensor of a quantized layer that the other layout has no place for, IntegrityError for a
    scale that is not a number or one for each output.
    """
    way, made = _Way(to_compressed), Made()
    recorded = records(source)
    known = {one: {way.leaves(t)[0]: t for t in one.tensors} for one in set(layers.values())}
    caches = way.cache(cache)
    for name, info in source.items():
        module, _, leaf = name.rpartition(".")
        one = layers.get(module, BF16)
        tensor = known.get(one, {}).get(leaf)
        kv = next((new for old, new in caches.items() if name.endswith(f".{old}")), None)
        if one.quant_algo is not None and tensor is None and kv is None and leaf != BIAS:
            raise _no_place(name, one, to_compressed)
        if tensor is not None and one.quant_algo is not None:
            new = f"{module}.{way.leaves(tensor)[1]}"
        else:
            new = name[: -len(next(old for old, target in caches.items() if target == kv))] + kv if kv else name
        if kv or (tensor is not None and one.quant_algo is not None and _is_scale(tensor)):
            _scale(made, source, name, new, way.scale(None if kv else tensor), recorded.get(name))
        else:
            made.tensors.append(NewTensor(new, info.dtype, info.shape, [source.place(name)]))
    return made


def _is_scale(tensor: StoredTensor) -> bool:
    """Whether compressed-tensors stores a tensor in another shape or as a reciprocal: numbers of the whole layer, and
    one for each output."""
    return tensor.content in ("scale", "positive") and len(tensor.dims) < 2


def _scale(
    made: Made,
    source: Tensors,
    name: str,
    new: str,
    ways: tuple[Callable[[Scale], Scale], Callable[[Scale], Scale]],
    recorded: Any,
) -> None:
    info = source[name]
    if info.dtype not in WIDTH or not info.nbytes:
        raise IntegrityError(f"{name} is {info.dtype} {list(info.shape)}, which is no scale.", hint="builder inspect")
    scale = Scale(info.dtype, info.shape, bytes(source.data(name)))
    result, record = scales.converted(scale, *ways, recorded)
    made.tensors.append(NewTensor(new, result.dtype, result.shape, [result.data]))
    if record is not None:
        made.records[new] = record
    if not scales.plausible(scale):
        made.suspicious.append(name)


def records(source: Tensors) -> dict[str, Any]:
    """What earlier conversions recorded in these files; {} where there is nothing that can be read."""
    found: dict[str, Any] = {}
    for file in source.files:
        try:
            content = json.loads(read_metadata(file).get(RECORD, "{}"))
        except ValueError:
            continue
        found |= content if isinstance(content, dict) else {}
    return found


def _no_place(name: str, one: NumberFormat, to_compressed: bool) -> UnsupportedError:
    layout = "compressed-tensors" if to_compressed else "the unified layout"
    return UnsupportedError(
        f"{name} has no place in {layout}.",
        why=f"There, a layer in {one.title} has no such tensor.",
        hint="Convert a checkpoint in another format (nvfp4, fp8), or quantize the original model to one.",
    )
