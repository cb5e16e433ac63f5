"""The tensors that a checkpoint is made of, by the headers of the model that it is made from. Pure.

They differ from the model's own: transformers leaves out what it does not load, keeps a few tensors in float32, and
ModelOpt's exporter writes experts that are stacked in one parameter as matrices of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from builder.architectures import catalog
from builder.architectures.facts import Architecture, StackedExperts
from builder.architectures.names import layer_of

Header = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Part:
    """A tensor to write, made of a tensor of the model's files, `source`, from its value number `start` on.

    dtype: as the model is served; BF16 stands for either 16-bit type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    start: int = 0


def parts(config: Mapping[str, Any], found: Mapping[str, Header], *, apart: bool = True) -> Iterator[Part]:
    """The tensors that transformers loads and ModelOpt writes, before quantization. found: those of the model's files.
    apart: whether stacked experts become matrices of their own, as ModelOpt writes them.

    Floats get the dtype BF16, but for those that stay in float32.
    """
    architecture = catalog.of(config)
    for name, (dtype, shape) in found.items():
        if is_loaded(architecture, config, name):
            kept = dtype if dtype not in FLOATS else "F32" if in_float32(architecture, name) else "BF16"
            for part, size, start in _apart(architecture.experts if apart else None, name, shape):
                yield Part(part, kept, size, name, start)


def tensors(config: Mapping[str, Any], found: Mapping[str, Header]) -> dict[str, Header]:
    """{name: (dtype, shape)} of the same."""
    return {part.name: (part.dtype, part.shape) for part in parts(config, found)}


def is_loaded(architecture: Architecture, config: Mapping[str, Any], name: str) -> bool:
    """Whether transformers loads this tensor: not those of layers after the last, which predict further tokens."""
    if any(fnmatchcase(name, pattern) for pattern in architecture.not_loaded):
        return False
    layer, layers = layer_of(architecture, name), config.get("num_hidden_layers")
    return layer is None or not layers or layer < layers


def in_float32(architecture: Architecture, name: str) -> bool:
    """Whether transformers keeps this tensor in float32, whatever dtype the model is loaded in."""
    return any(fnmatchcase(name, pattern) for pattern in architecture.float32)


def _apart(
    experts: StackedExperts | None, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, first value) of the matrices of each expert for a stacked parameter that is written so, else of the
    tensor itself."""
    parent = _parent(experts, name)
    if experts is None or parent is None or len(shape) != 3 or not experts.apart:
        yield name, shape, 0
        return
    number, outputs, inputs = shape
    leaves = ("gate_proj", "up_proj") if name.endswith(experts.gate_up) else ("down_proj",)
    matrix = outputs // len(leaves), inputs
    for count, (expert, leaf) in enumerate((expert, leaf) for expert in range(number) for leaf in leaves):
        yield f"{parent}.{expert}.{leaf}.weight", matrix, count * prod(matrix)


def _parent(experts: StackedExperts | None, name: str) -> str | None:
    """The module of the experts, if the tensor is one of their stacked parameters."""
    for part in (experts.gate_up, experts.down) if experts else ():
        if experts and name.endswith(f".{part}"):
            return f"{name.removesuffix(part)}{experts.module}"
    return None


def stacked(architecture: Architecture, name: str, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(experts, outputs, inputs) of a parameter that is quantized and written stacked; None for any other tensor."""
    experts = architecture.experts
    if experts is None or experts.apart or len(shape) != 3 or _parent(experts, name) is None:
        return None
    return (shape[0], shape[2], shape[1]) if experts.inputs_first else (shape[0], shape[1], shape[2])
