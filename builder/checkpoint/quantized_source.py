"""A quantized model before any weight is read: the model that it was made from, and whether its tensors are complete.

The plan, the memory estimate and the targets' checks work on the unquantized tensors, in whatever format the layers
are; so they are derived from the quantized ones. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from builder.architectures import catalog, names
from builder.checkpoint.compressed_tensors.config import SHAPE
from builder.checkpoint.description import TITLES, Description
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import TensorInfo
from builder.formats import registry
from builder.formats.assignment import Layers
from builder.formats.base import NumberFormat, StoredTensor
from builder.formats.registry import BF16
from builder.model import completeness, quantization_signs
from builder.model.completeness import Header

# Sizes in config.json that two checkpoints of one model share, in every layout.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Formats:
    """The format with the fewest bits, which names the checkpoint, and the layers in another one by its name."""

    whole: NumberFormat
    layers: Layers

    @property
    def quantized(self) -> tuple[NumberFormat, ...]:
        """The quantized formats among them, `whole` first."""
        every = (self.whole, *(registry.get(name) for name, modules in self.layers.items() if modules))
        return tuple(one for one in every if one.quant_algo is not None)


@dataclass
class _Problems:
    """Tensors that layers lack, scales of inputs that they lack, and tensors of a wrong shape or type."""

    missing: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def different_sizes(config: Mapping[str, Any], original: Mapping[str, Any]) -> list[str]:
    """The sizes in which a checkpoint's config.json differs from that of the model it should have been made from, each
    as a clause of a sentence. One that either of them leaves out counts as equal."""
    theirs, ours = (catalog.with_common_keys(dict(one)) for one in (config, original))
    both = [key for key in SIZES if theirs.get(key) is not None and ours.get(key) is not None]
    return [f"{key} is {theirs[key]}, not {ours[key]}" for key in both if theirs[key] != ours[key]]


def check(found: Description, where: str) -> None:
    """IntegrityError with the sentences in which configuration files and tensors contradict each other, if any."""
    if found.contradictions:
        raise IntegrityError(
            f"{where} describes its quantization in two ways that contradict each other.",
            why=" ".join(found.contradictions),
            hint="Copy or download the whole checkpoint again, all files of one revision, or correct the wrong file.",
        )


def unquantized(found: Description, where: str, *, scales: bool = False) -> dict[str, Header]:
    """{tensor: (dtype, shape)} of the model that was quantized: weights in 16 bits, and no scales. For the Hugging Face
    layouts.

    scales: missing scales of inputs are no error, because they will be calibrated. IntegrityError if tensors of a
    quantized layer are missing or have another type or shape than its format says, or if the model isn't complete.
    """
    problems, tensors, used = _Problems(), dict[str, Header](), set[str]()
    for module, one in found.layers.items():
        if one.quant_algo is not None:
            tensors[f"{module}.weight"] = "BF16", _layer(found, module, one, problems)
            used |= {f"{module}.{_leaf(found, tensor)}" for tensor in one.tensors} | {f"{module}.{SHAPE}"}
    cache = tuple(f".{name.rpartition('.')[2]}" for name in (*found.cache.unified, *found.cache.compressed_tensors))
    for name, info in found.headers.items():
        if name in used or (cache and name.endswith(cache)):
            continue
        module, _, leaf = name.rpartition(".")
        if leaf in quantization_signs.LEAVES:  # of a layer without a weight
            problems.missing.append(f"{module}.weight")
        tensors[name] = info.dtype, info.shape
    _raise(problems, found, where, scales=scales)
    config = {key: value for key, value in found.config.items() if key not in ("quantization_config", "quantization")}
    return completeness.check(config, {"": tensors}, None, where)


def _leaf(found: Description, tensor: StoredTensor) -> str:
    compressed = found.layout == "compressed_tensors" and tensor.compressed_tensors is not None
    return str(tensor.compressed_tensors) if compressed else tensor.unified


def _layer(found: Description, module: str, one: NumberFormat, problems: _Problems) -> tuple[int, ...]:
    """The shape of a quantized layer's weight, [outputs, inputs]. Notes what is wrong with its tensors."""
    stored = found.headers[f"{module}.{_leaf(found, one.weight)}"]
    weight = one.weight.weight_shape(stored.shape)
    if one.group_size and weight[1] % one.group_size:
        problems.wrong.append(f"{module}: {weight[1]} inputs, which is not a multiple of {one.group_size}")
    for tensor in one.tensors[1:]:
        name = f"{module}.{_leaf(found, tensor)}"
        info = found.headers.get(name)
        if info is not None:
            if not _fits(info, tensor, weight, found):
                problems.wrong.append(f"{name} is {info.dtype} {list(info.shape)}")
        elif not tensor.optional and tensor.compressed_tensors != "":
            (problems.inputs if tensor.calibrated else problems.missing).append(name)
    return weight


def _fits(info: TensorInfo, tensor: StoredTensor, weight: tuple[int, ...], found: Description) -> bool:
    """Whether a scale has the type and size that its format says. compressed-tensors stores scales in other shapes,
    and in the model's own type (compressed_tensors/tensors.py)."""
    typed = info.dtype in tensor.dtypes or (found.layout == "compressed_tensors" and tensor.content != "codes")
    shape = tensor.shape(weight)
    return typed and (info.shape == shape if len(shape) == 2 else math.prod(info.shape) == math.prod(shape))


def _raise(problems: _Problems, found: Description, where: str, *, scales: bool) -> None:
    shown = completeness.names
    problems.missing = sorted(set(problems.missing))
    if problems.missing or problems.wrong:
        why = [f"Missing: {shown(problems.missing)}."] * bool(problems.missing)
        why += [f"Not what their format says: {shown(problems.wrong)}."] * bool(problems.wrong)
        raise IntegrityError(
            f"{where} is not complete: {len(problems.missing)} tensors of quantized layers are missing, and "
            f"{len(problems.wrong)} are of another type or shape.",
            why=" ".join([f"It is in {TITLES[found.layout]}.", *why]),
            hint="Copy or download the whole checkpoint again.",
        )
    if problems.inputs and not scales:
        raise IntegrityError(
            f"{where} has no scales for the inputs of {len(problems.inputs)} quantized layers.",
            why=f"Missing: {shown(problems.inputs)}. It was exported without calibration.",
            hint="Calibrate them: add --calibrate-scales (the weights stay as they are).",
        )


def formats(found: Description) -> Formats:
    """The formats of a Hugging Face layout."""
    return _grouped(found.layers)


def formats_of_engine_layout(found: Description, original: Mapping[str, Header], config: Mapping[str, Any]) -> Formats:
    """The same for TensorRT-LLM's layout, by the Hugging Face names in the original model's tensors."""
    architecture = catalog.of(config)
    modules = [n.removesuffix(".weight") for n, (_, s) in original.items() if names.is_quantizable(architecture, n, s)]
    return _grouped({module: found.formats.of(names.engine_layer(architecture, module)) for module in modules})


def _grouped(layers: Mapping[str, NumberFormat]) -> Formats:
    quantized = [one for one in layers.values() if one.quant_algo is not None]
    whole = min(dict.fromkeys(quantized), key=lambda one: one.bits, default=BF16)
    others: dict[str, tuple[str, ...]] = {}
    for module, one in layers.items():
        if one is not whole:
            others[one.name] = (*others.get(one.name, ()), module)
    return Formats(whole, others)
