"""Tensors of the unified layout <-> those of compressed-tensors: other names, scales as reciprocals, the same weights.

Weights, block scales, norms and embeddings are not touched: their bytes are copied from file to file. What a scale was
before is recorded in the file's header where it can't be computed back (`__metadata__`, key RECORD), so that a
conversion there and back gives the same bytes. Readers of safetensors ignore such entries.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from builder.checkpoint.compressed_tensors import scales
from builder.checkpoint.compressed_tensors.config import SHAPE
from builder.checkpoint.compressed_tensors.scales import WIDTH, Scale
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, read_metadata
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


def to_divisor(tensor: StoredTensor | None, scale: Scale) -> Scale:
    """A unified scale as compressed-tensors stores it: [1] or [outputs, 1]. tensor: None for one of the KV cache."""
    reciprocal = tensor is not None and tensor.reciprocal
    made = scales.multiplier_to_divisor(scale) if reciprocal else scales.widened(scale)
    return Scale(made.dtype, (len(made.data) // 4, 1) if tensor is not None and tensor.dims else (1,), made.data)


def to_multiplier(tensor: StoredTensor | None, scale: Scale) -> Scale:
    """The inverse: [] or [outputs], F32."""
    reciprocal = tensor is not None and tensor.reciprocal
    made = scales.divisor_to_multiplier(scale) if reciprocal else scales.widened(scale)
    return Scale(made.dtype, (len(made.data) // 4,) if tensor is not None and tensor.dims else (), made.data)


class _Names:
    """What the tensors of one layout are called in the other."""

    def __init__(self, layers: Mapping[str, NumberFormat], cache: KvCacheFormat, *, to_compressed: bool) -> None:
        self.layers, self.to_compressed = layers, to_compressed
        self._leaves = {one: dict(self._pairs(one)) for one in set(layers.values()) if one.quant_algo is not None}
        scales = zip(cache.unified, cache.compressed_tensors, strict=True)
        self._cache = {f".{a}": f".{b}" for a, b in (pair if to_compressed else pair[::-1] for pair in scales)}

    def _pairs(self, one: NumberFormat) -> Iterator[tuple[str, tuple[str, StoredTensor]]]:
        for tensor in one.tensors:
            there = tensor.unified if tensor.compressed_tensors is None else tensor.compressed_tensors
            before, after = (tensor.unified, there) if self.to_compressed else (there, tensor.unified)
            if there:
                yield before, (after, tensor)

    def of(self, name: str) -> tuple[str, StoredTensor | None, bool]:
        """The new name; which tensor of its layer's format it is, if it is one; whether it is a scale, which may be
        stored in another shape or as a reciprocal. UnsupportedError if there is no place for it."""
        for old, new in self._cache.items():
            if name.endswith(old):
                return name.removesuffix(old) + new, None, True
        module, _, leaf = name.rpartition(".")
        one = self.layers.get(module, BF16)
        if one.quant_algo is None or leaf == BIAS:
            return name, None, False
        if leaf not in self._leaves[one]:
            raise _no_place(name, one, self.to_compressed)
        new, tensor = self._leaves[one][leaf]
        return f"{module}.{new}", tensor, tensor.content in ("scale", "positive") and len(tensor.dims) < 2


def convert(source: Tensors, layers: Mapping[str, NumberFormat], cache: KvCacheFormat, *, to_compressed: bool) -> Made:
    """All tensors in the other layout. layers: {linear layer: the format that it is stored in}.

    UnsupportedError for a tensor of a quantized layer that the other layout has no place for, IntegrityError for a
    scale that is not a number, or one for each output.
    """
    names, made, recorded = _Names(layers, cache, to_compressed=to_compressed), Made(), records(source)
    if to_compressed:
        made.tensors += [_shape(module, _weight_shape(source, module, one)) for module, one in _shaped(layers)]
    else:
        for module, one in _shaped(layers):
            _check_shape(source, module, _weight_shape(source, module, one))
    for name, info in source.items():
        if not to_compressed and _is_shape(name, layers):
            continue
        new, tensor, scale = names.of(name)
        if scale:
            there, back = partial(to_divisor, tensor), partial(to_multiplier, tensor)
            _scale(made, source, name, new, (there, back) if to_compressed else (back, there), recorded.get(name))
        else:
            made.tensors.append(NewTensor(new, info.dtype, info.shape, [source.place(name)]))
    return made


def _shaped(layers: Mapping[str, NumberFormat]) -> Iterator[tuple[str, NumberFormat]]:
    """The layers that have a tensor `weight_shape` there."""
    scheme = {one: one.compressed_tensors for one in set(layers.values())}
    return ((module, one) for module, one in layers.items() if (found := scheme[one]) and found.has_shape)


def _is_shape(name: str, layers: Mapping[str, NumberFormat]) -> bool:
    module, _, leaf = name.rpartition(".")
    found = layers[module].compressed_tensors if leaf == SHAPE and module in layers else None
    return found is not None and found.has_shape


def _weight_shape(source: Tensors, module: str, one: NumberFormat) -> tuple[int, int]:
    """[outputs, inputs] of a layer, in either layout."""
    there = (f"{module}.{leaf}" for leaf in (one.weight.compressed_tensors, one.weight.unified))
    return one.weight.weight_shape(next(source[name].shape for name in there if name in source))


def _shape(module: str, shape: tuple[int, int]) -> NewTensor:
    return NewTensor(f"{module}.{SHAPE}", "I64", (2,), [struct.pack("<2q", *shape)])


def _check_shape(source: Tensors, module: str, shape: tuple[int, int]) -> None:
    """IntegrityError if `weight_shape` says something else than the packed weight."""
    name = f"{module}.{SHAPE}"
    info = source.get(name)
    data = source.read(name) if info else b""
    form = {16: "<2q", 8: "<2i"}.get(len(data))
    stated = struct.unpack(form, data) if form else shape if info is None else ()
    if stated != shape:
        raise IntegrityError(
            f"{name} says {list(stated)}, and the packed weight has {shape[0]} outputs and {shape[1]} inputs.",
            why="The builder packs weights without padding: inputs must be a multiple of 4.",
            hint="Copy or download the checkpoint again, or quantize the original model.",
        )


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
    scale = Scale(info.dtype, info.shape, source.read(name))
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
