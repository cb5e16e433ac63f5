"""The tensors that a checkpoint is made of, by the headers of the model that it is made from. Pure.

They differ from the model's own: transformers leaves out what it does not load, keeps a few tensors in float32, and
ModelOpt's exporter writes experts that are stacked in one parameter as matrices of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from builder.architectures import catalog
from builder.architectures.facts import Architecture, StackedExperts
from builder.architectures.names import layer_of

Header = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape
FLOATS = ("BF16", "F16", "F32")


def tensors(config: Mapping[str, Any], found: Mapping[str, Header]) -> dict[str, Header]:
    """The tensors that transformers loads and ModelOpt writes, before quantization: {name: (dtype, shape)}.

    found: those of the model's files. Floats get the dtype BF16, which stands for either 16-bit type, but for those
    that stay in float32.
    """
    architecture = catalog.of(config)
    made: dict[str, Header] = {}
    for name, (dtype, shape) in found.items():
        if is_loaded(architecture, config, name):
            kept = dtype if dtype not in FLOATS else "F32" if in_float32(architecture, name) else "BF16"
            made.update((part, (kept, size)) for part, size in _apart(architecture.experts, name, shape))
    return made


def is_loaded(architecture: Architecture, config: Mapping[str, Any], name: str) -> bool:
    """Whether transformers loads this tensor: not those of layers after the last, which predict further tokens."""
    if any(fnmatchcase(name, pattern) for pattern in architecture.not_loaded):
        return False
    layer, layers = layer_of(architecture, name), config.get("num_hidden_layers")
    return layer is None or not layers or layer < layers


def in_float32(architecture: Architecture, name: str) -> bool:
    """Whether transformers keeps this tensor in float32, whatever dtype the model is loaded in."""
    return any(fnmatchcase(name, pattern) for pattern in architecture.float32)


def _apart(experts: StackedExperts | None, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The matrices of each expert for a stacked parameter that is written so, else the tensor itself."""
    parent = _parent(experts, name)
    if experts is None or parent is None or len(shape) != 3 or not experts.apart:
        yield name, shape
        return
    number, outputs, inputs = (shape[0], shape[2], shape[1]) if experts.inputs_first else shape
    both = name.endswith(experts.gate_up)
    for expert in range(number):
        if both:
            yield f"{parent}.{expert}.gate_proj.weight", (outputs // 2, inputs)
            yield f"{parent}.{expert}.up_proj.weight", (outputs // 2, inputs)
        else:
            yield f"{parent}.{expert}.down_proj.weight", (outputs, inputs)


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
